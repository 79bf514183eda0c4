"""What a command leaves behind, and that it refuses in one line."""

from pathlib import Path

from fault_cases import Done


def listing(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, with the bytes of its files."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


def assert_refused(done: Done, code: int, *says: str) -> None:
    assert (done.code, done.out) == (code, ""), done
    (line,) = done.err.splitlines()
    assert line.startswith("moefy: ") and line.isprintable() and len(line) < 1000
    assert [part for part in says if part not in line] == [], line
