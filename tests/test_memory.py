from pathlib import Path

import pytest

from fastdiff import memory


def test_the_machine_has_memory() -> None:
    assert 2**26 < memory.memory_available() <= memory.memory_limit()


@pytest.mark.parametrize(
    ("line", "files", "expected"),
    [
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": "1000"}, 1000),
        ("0::/a/b", {"a/b/memory.max": "700", "a/memory.max": "1000"}, 700),
        ("4:memory:/job", {"memory/job/memory.limit_in_bytes": "900", "memory/memory.limit_in_bytes": str(2**63)}, 900),
        ("4:cpu,memory:/host/path", {"memory/memory.limit_in_bytes": "800"}, 800),
        ("4:cpu:/job", {"memory/job/memory.limit_in_bytes": "900"}, None),
    ],
)
def test_a_control_group_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, files: dict[str, str], expected: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    machine = memory.memory_limit()
    lines = memory._lines
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_lines", lambda path: [line] if path == Path("/proc/self/cgroup") else lines(path))
    assert memory.memory_limit() == (machine if expected is None else expected)
