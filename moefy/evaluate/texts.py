"""Texts that every Python carries, for want of better ones."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

from moefy.files.publish import write_text


def own_texts(place: Path) -> list[Path]:
    """Prose and code: the topics of Python's manual, and a few of its modules."""
    manual = place / "python-manual.txt"
    write_text(manual, "\n\n\n".join(pydoc_data.topics.topics.values()))
    library = Path(pydoc_data.__file__).parent.parent
    modules = [library / name for name in ("argparse.py", "csv.py", "textwrap.py", "heapq.py")]
    code = place / "python-library.txt"
    write_text(code, "\n\n\n".join(path.read_text("utf-8") for path in modules if path.is_file()))
    return [manual, code]
