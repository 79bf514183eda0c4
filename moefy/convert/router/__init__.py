"""Ways to build a router: one file each, holding one public function `fit`."""
