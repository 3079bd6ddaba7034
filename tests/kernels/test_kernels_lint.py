"""The lint finds nothing in the kernels and everything in planted defects."""

from pathlib import Path

import pytest

from dmd2_kernels import lint


def test_the_kernels_pass_the_lint(capsys: pytest.CaptureFixture[str]) -> None:
    assert lint.main([]) == 0
    assert "0 findings" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("v = tl.load(x + offs)", "not cast at once"),
        ("v = tl.load(x + offs, mask=mask).to(ACC)", "without other="),
        ("v = tl.load(x + offs, mask).to(ACC)", "without other="),
        ("pid = tl.program_id(0)", "not widened"),
        ("pid = tl.program_id(0).to(tl.int32)", "not widened"),
        ("tl.atomic_add(y, v)", "no atomics"),
        ("from triton.language import sum", "imported from triton.language"),
        ("@triton.autotune(configs=[], key=[])\ndef f(): ...", "no autotuning"),
        ("v = tl.extra.libdevice.erf(v)", "no libdevice"),
    ],
)
def test_a_planted_defect_is_found(line: str, rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kernel.py").write_text(f"import triton\n{line}\n")
    assert lint.main([str(tmp_path)]) == 1
    (finding, total) = capsys.readouterr().out.splitlines()
    assert "kernel.py:2: " in finding
    assert rule in finding
    assert "1 findings" in total


def test_a_folder_without_kernels_is_not_a_pass(tmp_path: Path) -> None:
    assert lint.main([str(tmp_path)]) == 2
