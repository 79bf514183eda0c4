"""Ways to split an FFN: one file each, holding one public function `split`."""
