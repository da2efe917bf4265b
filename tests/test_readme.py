from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from threshnet_fast.bench.results import COLUMNS, latest_rows, read_rows
from threshnet_fast.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results" / "models.csv"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def script(name: str):
    """A file of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        # As where it is run as a script: it may import those beside it.
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("one_thread")
def test_usage_example_runs():
    (example,) = blocks("python")
    assert len(example.splitlines()) <= 10
    namespace: dict[str, object] = {}
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(example, "README.md", "exec"), namespace)
    logits = namespace["logits"]
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (2, 10)
    assert "base.3.conv1" in output.getvalue(), "explain printed the steps"


def test_exactly_two_set_up_commands():
    assert blocks("sh") == [
        "pip install -c constraints.txt -e . && threshnet-fast bench\n",
        'pip install -c constraints.txt -e ".[test]" && pytest\n',
    ]


def test_commands_exist():
    commands = re.findall(r"`(threshnet-fast [^`]+)`", README)
    assert len(commands) >= 3
    for command in commands:
        build_parser().parse_args(shlex.split(command)[1:])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not re.match(r"[a-z]+:", target):
            assert (document.parent / target).exists(), target


def test_tables_are_those_of_the_csv_file():
    table = script("table")
    rows = latest_rows(read_rows(RESULTS))
    for document in table.DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        assert table.render(text, rows) == text, f"{document.name}: run benchmarks/table.py"
    assert "| threshnet95 |" in README


def test_results_are_complete():
    rows = read_rows(RESULTS)
    assert {row["provider"] for row in rows} >= {"fused", "eager", "channels-last"}
    for row in latest_rows(rows):
        if row["device"] != "cpu":
            # A GPU may be too small for some engine; the table says so.
            continue
        assert row["status"] == "ok", row
        assert float(row["error"]) <= float(row["error_limit"])


class TestTable:
    def rows(self) -> list[dict[str, str]]:
        common = dict.fromkeys(COLUMNS, "") | {
            "run": "1",
            "model": "threshnet95",
            "height": "32",
            "width": "32",
            "batch": "1",
            "dtype": "float32",
            "threads": "2",
            "status": "ok",
            "time": "2030-01-02T03:04:05+00:00",
        }
        times = {"fused": ("2.0", "2.5"), "eager": ("8.0", "9.0"), "openvino": ("1.0", "1.5")}
        return [
            common
            | {"provider": name, "min_ms": low, "p50_ms": median}
            | {"speedup_min": str(1 / float(low)), "speedup_p50": str(1.5 / float(median))}
            for name, (low, median) in times.items()
        ]

    def test_losses_are_shown(self):
        table = script("table")
        text = table.summary(self.rows())
        assert "| threshnet95 | 32x32, batch 1 | 2 | 2.00 | 8.00 | **1.00** | 0.50x |" in text
        text = table.full(self.rows())
        assert "| 2.00 / 2.50 | 8.00 / 9.00 | **1.00** / 1.50 | 0.50x / 0.60x |" in text

    def test_provider_that_failed_is_shown(self):
        rows = self.rows()
        rows[1]["status"] = "wrong result"
        assert "| 2.00 | failed | **1.00** |" in script("table").summary(rows)

    def test_render_replaces_what_is_between_markers_only(self):
        table = script("table")
        text = "a\n<!-- performance:summary:begin -->\nold\n<!-- performance:summary:end -->\nb\n"
        once = table.render(text, self.rows())
        assert once.startswith("a\n<!--")
        assert once.endswith("-->\nb\n")
        assert "old" not in once
        assert table.render(once, self.rows()) == once

    @pytest.mark.parametrize(
        "text",
        [
            "<!-- performance:summary:begin -->",
            "<!-- performance:nothing:begin --><!-- performance:nothing:end -->",
        ],
    )
    def test_bad_markers(self, text):
        table = script("table")
        with pytest.raises(table.CommandError):
            table.render(text, self.rows())

    def test_check_mode(self, monkeypatch, tmp_path, capsys):
        table = script("table")
        document = tmp_path / "a.md"
        document.write_text("<!-- performance:columns:begin --><!-- performance:columns:end -->")
        monkeypatch.setattr(table, "DOCUMENTS", (document,))
        monkeypatch.setattr(sys, "argv", ["table.py", "--check"])
        assert table.main() == 1
        assert "a.md is out of date" in capsys.readouterr().err
        monkeypatch.setattr(sys, "argv", ["table.py"])
        assert table.main() == 0
        assert "| `min_ms` |" in document.read_text()
        monkeypatch.setattr(sys, "argv", ["table.py", "--check"])
        assert table.main() == 0
