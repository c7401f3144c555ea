"""The pages keep their word: commands run, examples give what they show, keys are those the code writes, numbers are measured.

Commands run in a small workplace that looks like a checkout after ``make quickstart``: the same paths, a few kilobytes
of text, a model of some thousand weights, and run files with the same number of steps on fewer tokens. Each fenced
block stands alone and its lines run in order.
"""

import ast
import doctest
import glob
import importlib.util
import inspect
import json
import os
import pydoc_data.topics
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
import zstandard
from typer.core import TyperGroup
from typer.main import get_command

from cpt.announce import environment
from cpt.checkpoint.portable import COMPLETE, CheckpointMeta
from cpt.cli import app
from cpt.config import ModelSection, load_config, validate
from cpt.data.pack_index import ensure_index
from cpt.data.skipping import SkippedRow, write_skipped
from cpt.data.token_store import StoreLabel, TokenizerFacts, TokenStore, write_split
from cpt.data.vocabulary import VocabularyExtension, write_extension
from cpt.eval.records import EvalRecord, SourceEval, aggregate, write_eval
from cpt.eval.results import (
    ITEMS,
    PIECES,
    TEXTS,
    CopyingProbe,
    Measured,
    SuiteRecord,
    TaskResult,
    group_scores,
    write_suite_record,
)
from cpt.eval.suite import load_suite
from cpt.heartbeats import Beat, write_beat
from cpt.model.build import Needs, build_model
from cpt.plan import PlanSource, StageWish, build_plan
from cpt.planner.laws.table import LAWS
from cpt.planner.pilots import PilotsFile
from cpt.recommendation import BaseLoss, LawNames, ObservationsFile, PromisePoint, Recommendation, RecommendedStage
from cpt.rundir import RunDir
from cpt.train.engine import Topology
from cpt.train.metrics import MetricsHook, Throughput
from cpt.train.phases import PHASES
from cpt.train.schedules import SCHEDULES
from cpt.train.stepinfo import StepInfo
from data_tools.choose_documents import Choice, make_view
from data_tools.corpus.stage import StageRequest, run_stage
from data_tools.store_builder import StoreRequest, build_store
from data_tools.train_tokenizer import train_bpe

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"(?:<!-- excerpt: (?P<excerpt>\S+) -->\n)?^```(?P<language>\w+)\n(?P<body>.*?)^```$", re.M | re.S)

# What a page leaves to the reader -> what it is in the workplace.
PLACEHOLDERS = {"TOKENIZER": "runs/quickstart/tokenizer"}
VOCAB_SIZE, SEQ_LEN, BATCH_TOKENS = 300, 16, 64
# Appended where several processes start: what is shown is that they do, and they cost more than the steps. Not where
# checkpoints are asked for: a later command goes on from them.
FEW_STEPS = f" train.tokens={4 * BATCH_TOKENS} eval.at_steps=[]"
# The planning page's questions about runs/ count in steps of so many tokens; the workplace's table in its own.
STEP_TOKENS = 2048
MAKE = {"make quickstart": "cpt quickstart", "make test": "-m pytest"}


def blocks(page: Path, language: str) -> list[str]:
    return [
        match["body"] for match in FENCE.finditer(page.read_text(encoding="utf-8")) if match["language"] == language
    ]


# Pages whose blocks are one walk: each goes on with what the ones before it made.
WALKS = ("data.md", "evaluation.md", "operations.md")


def command_blocks() -> Iterator[Any]:
    for page in PAGES:
        bodies = blocks(page, "bash")
        for number, body in enumerate(["".join(bodies)] if page.name in WALKS else bodies, start=1):
            yield pytest.param(body.replace("\\\n", " ").splitlines(), id=f"{page.name}-{number}")


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- the workplace


def write_corpus(path: Path, documents: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(json.dumps({"text": document}) for document in documents)
    path.write_bytes(zstandard.compress(lines.encode()))


def write_raw_files(root: Path, prose: list[str], code: list[str]) -> None:
    """What the page on data starts from: long enough to pass for web pages, one benchmark item among them."""
    for number in range(2):
        general = ["\n".join(prose[first : first + 8]) for first in range(number, len(prose) - 8, 4)]
        write_corpus(root / "raw" / "general" / f"{number}.jsonl.zst", general)
        write_corpus(
            root / "raw" / "medical" / f"{number}.jsonl.zst", [" ".join(text.split()) for text in code[number::2]]
        )
    (root / "evals").mkdir()
    items = [{"question": " ".join(prose[40].split()), "answer": "42"}, {"question": "none " * 20, "answer": "no"}]
    (root / "evals" / "quiz.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))


def shrink_run_files(folder: Path) -> None:
    """The same runs with the same number of steps, on rows of 16 tokens; of the pilots two short ones."""
    for path in folder.glob("*_cpu.yaml"):
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        if "pilots" in raw:
            tiny = {"train.global_batch_tokens": BATCH_TOKENS, "eval.tokens_per_source": 64}
            few = {"full": None, "budgets": [8 * BATCH_TOKENS], "shares_general": [0.0, 0.5]}
            path.write_text(yaml.safe_dump({"pilots": raw["pilots"] | {"overrides": tiny} | few}), encoding="utf-8")
            continue
        steps = int(str(raw["train"]["tokens"]).replace("_", "")) // raw["train"]["global_batch_tokens"]
        raw["data"]["seq_len"] = SEQ_LEN
        raw["train"] |= {"tokens": steps * BATCH_TOKENS, "global_batch_tokens": BATCH_TOKENS, "micro_batch_size": 2}
        raw["eval"] = raw.get("eval", {}) | {"tokens_per_source": 64}
        path.write_text(yaml.safe_dump(raw), encoding="utf-8")


@pytest.fixture(scope="module")
def quickstarted(tmp_path_factory: pytest.TempPathFactory, write_planning_tables: Callable[..., None]) -> Path:
    """What ``make quickstart`` leaves behind, and a corpus of one's own, all tiny."""
    root = tmp_path_factory.mktemp("quickstarted")
    made = root / "runs" / "quickstart"
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    prose = [paragraph for text in topics[:30] for paragraph in text.split("\n\n")]
    code = re.split(r"\n(?=def |class )", inspect.getsource(inspect))
    train_bpe(prose, out=made / "tokenizer", vocab_size=VOCAB_SIZE)
    for name, documents, domain in (("prose", prose, "general"), ("code", code, "code")):
        file = root / "raw" / f"{name}.jsonl.zst"
        write_corpus(file, documents)
        store = made / "stores" / name
        build_store(StoreRequest((str(file),), made / "tokenizer", store, name, domain, heldout_fraction=0.2))
    write_corpus(root / "corpus" / "a.jsonl.zst", prose[::2])
    write_corpus(root / "corpus" / "b.jsonl.zst", code)
    write_raw_files(root, prose, code)
    fresh = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    base: Any = build_model(ModelSection(fresh=fresh), Needs(SEQ_LEN, VOCAB_SIZE, seed=1)).model
    base.save_pretrained(made / "base_hf")
    shutil.copytree(made / "tokenizer", made / "base_hf", dirs_exist_ok=True)
    shutil.copytree(ROOT / "configs", root / "configs")
    shrink_run_files(root / "configs" / "runs")
    write_planning_tables(root, params=base.num_parameters(), step_tokens=BATCH_TOKENS)
    return root


@pytest.fixture
def workplace(quickstarted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quickstarted, tmp_path / "workplace"))


def made_small(command: str) -> str:
    """Laws are compared by ``cpt plan compare`` alone; the quickstart's pilots are asked about as many steps of the
    workplace's size; a few kilobytes of text need a larger held-out part, more epochs and rarer new tokens.
    """
    if command.startswith("cpt data tokenize --input ready/"):
        command += " --heldout-fraction 0.2"
    if "data.mix." in command or ("stores/ready" in command and "preview-mix" in command):
        command += " data.max_epochs=90"
    command = command.replace("--num-tokens 2000", "--num-tokens 20 --min-count 5").replace("--seq-len 8192", "")
    command = command.replace("stores/general --seq-len 2048", "stores/general --seq-len 16 --seq-len 64")
    command = command.replace("--tokens +100K", "--tokens +2K")
    if re.match(r"cpt plan (recommend|predict) ", command) and "--law" not in command:
        command += " --law l1"
    command = command.replace(f"batch_tokens={STEP_TOKENS}", f"batch_tokens={BATCH_TOKENS}")
    if "runs/pilots_cpu" not in command:
        return command

    def smaller(option: re.Match[str]) -> str:
        return f"{option[1]} {float(option[2]) * BATCH_TOKENS / STEP_TOKENS:g}"

    return re.sub(r"(--tokens) (\S+)", smaller, command)


def expand(raw: str) -> list[str]:
    """What a shell makes of a word: a quoted glob stays one."""
    word = "".join(shlex.split(raw))
    return (sorted(glob.glob(word)) if word == raw else []) or [word]


def run_here(command: str, cpt: Callable[..., Any]) -> None:
    """A `cpt` command in this process, which has torch loaded already; globs are expanded as a shell does."""
    command = made_small(command)
    done = cpt(*[word for raw in shlex.split(command, comments=True, posix=False) for word in expand(raw)][1:])
    assert done.code == 0, f"{command}\n{done.text[-4000:]}"


def run_as_process(command: str, workplace: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=workplace,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def interrupt(workplace: Path, command: str) -> None:
    """A run to resume is one that was killed before its last checkpoint."""
    checkpoints = RunDir(workplace / command.split()[2]).checkpoints
    shutil.rmtree(max(checkpoints.glob("step_*")))
    assert list(checkpoints.glob("step_*")), "an older checkpoint is needed to resume from"


# --- commands


@pytest.mark.parametrize("commands", command_blocks())
def test_every_command_of_the_pages_runs(
    commands: list[str], workplace: Path, workshop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("CPT_CACHE", str(workplace / "cache"))
    for command in commands:
        for placeholder, value in PLACEHOLDERS.items():
            command = re.sub(rf"\b{placeholder}\b", value, command)
        if command.startswith("make "):
            shown = subprocess.run(["make", "-n", command.split()[1]], cwd=ROOT, capture_output=True, text=True)
            assert shown.returncode == 0 and MAKE[command] in shown.stdout, command
            continue
        if command.startswith("cpt resume"):
            interrupt(workplace, command)
        if "--nproc" in command or command.startswith("deepspeed"):
            run_as_process(command + ("" if "checkpoint." in command else FEW_STEPS), workplace)
        else:
            run_here(command, workshop.cpt)
    for config in workplace.glob("runs/*/config.yaml"):
        check_run_folder(RunDir(config.parent))


def lines_for_machines() -> list[str]:
    """Commands in ``sh`` blocks: they need a cluster, a container engine or root. tests/multinode, tests/slurm and
    tests/image run their like.
    """
    bodies = (body for page in PAGES for body in blocks(page, "sh"))
    return [line for body in bodies for line in body.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("line", lines_for_machines())
def test_commands_that_need_machines_have_verbs_options_and_files_that_there_are(line: str) -> None:
    program, *words = shlex.split(line, comments=True)
    if program == "make":
        assert subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True).returncode == 0, line
        return
    files = [word for word in words if word.startswith(("docker/", "configs/"))]
    assert all((ROOT / file).is_file() for file in files), line
    if program == "cpt":
        check_spelling(get_command(app), words)


def check_spelling(verb: Any, words: list[str], parent: Any = None) -> None:
    """Raises what the command line would say about unknown verbs and options; runs nothing."""
    context = verb.make_context(verb.name, list(words), parent=parent)
    if isinstance(verb, TyperGroup):
        _, chosen, rest = verb.resolve_command(context, [*context._protected_args, *context.args])
        check_spelling(chosen, rest, context)


def check_run_folder(rundir: RunDir) -> None:
    """A real run's files hold the documented keys, and its folder nothing that the page does not name."""
    named = {name.split("/")[0] for name in documented_keys("Run folder")}
    assert {entry.name for entry in rundir.root.iterdir()} <= named
    sources = dict.fromkeys(("general", "domain", "medical"), "NAME") | dict.fromkeys(PHASES, "PHASE")
    for line in rundir.metrics.read_text().splitlines():
        assert keys_of(json.loads(line), sources) == documented_keys("metrics.jsonl")
    assert keys_of(json.loads(rundir.environment.read_text()), {}) == documented_keys("environment.json")
    rows = event_rows()
    for line in rundir.events.read_text().splitlines():
        event = json.loads(line)
        assert event.keys() == {"time", "step", "event"} | rows[event["event"]]
    for checkpoint in rundir.checkpoints.iterdir():
        assert json.loads((checkpoint / "meta.json").read_text()).keys() == documented_keys("meta.json")
        written = {entry.name for entry in checkpoint.iterdir()}
        assert written == {COMPLETE, *json.loads((checkpoint / COMPLETE).read_text())}


# --- examples


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_give_what_they_show(page: Path) -> None:
    source = "\n".join(blocks(page, "python"))
    example = doctest.DocTestParser().get_doctest(source, {}, page.name, str(page), 0)
    told: list[str] = []
    doctest.DocTestRunner(verbose=False).run(example, out=told.append)
    assert not told, "".join(told)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_examples_fit_the_file_they_belong_to(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for body in blocks(page, "yaml"):
        sections = yaml.safe_load(body)
        if "pilots" in sections:
            assert PilotsFile.model_validate(sections).pilots.run.is_file()
            continue
        if "groups" in sections:  # a suite, whose paths count from the folder it lies in
            shutil.copytree(ROOT / "configs" / "evals" / "items", tmp_path / "items", dirs_exist_ok=True)
            (tmp_path / "suite.yaml").write_text(body, encoding="utf-8")
            assert load_suite(tmp_path / "suite.yaml").groups
            continue
        raw = load_config(ROOT / "configs" / "runs" / "cpt_cpu.yaml").model_dump(mode="json")
        for section, values in sections.items():
            raw[section] |= values
        validate(raw)


def test_every_schedule_is_explained_and_drawn() -> None:
    page = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    drawn = load_script(ROOT / "docs" / "images" / "make_images.py").SCHEDULES
    assert {entry["name"] for entry in drawn} == set(SCHEDULES)
    assert all(f"| `{name}`" in page for name in SCHEDULES)


def test_every_law_is_explained_by_what_it_can() -> None:
    page = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| [^|]+ \| ?(yes|) ?\| ?(yes|) ?\| ?(yes|) ?\| ", page, re.M)
    told = {name: tuple(cell == "yes" for cell in cells) for name, *cells in rows}
    assert told == {law.name: (law.sizes, law.rises, law.many_sources) for law in LAWS.values()}


def test_pictures_are_what_the_code_draws() -> None:
    script = load_script(ROOT / "docs" / "images" / "make_images.py")
    for name, draw in script.PICTURES.items():
        picture = (ROOT / "docs" / "images" / name).read_text(encoding="utf-8")
        assert picture == draw(), f"docs/images/{name} is out of date: python docs/images/make_images.py"


# --- keys


def section_of(page: Path, heading: str) -> str:
    """From a heading to the next one of any level."""
    text = page.read_text(encoding="utf-8")
    match = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", text, re.M | re.S)
    assert match, f"{page.name} has no section {heading}"
    return match[1]


def documented_keys(heading: str) -> set[str]:
    """First column of the table under a heading of the formats page."""
    return set(re.findall(r"^\| `([^`]+)` \|", section_of(ROOT / "docs" / "formats.md", heading), re.M))


def event_rows() -> dict[str, set[str]]:
    """Event -> documented further keys."""
    rows = re.findall(
        r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", section_of(ROOT / "docs" / "formats.md", "events.jsonl"), re.M
    )
    return {event: set(re.findall(r"`(\w+)`", details)) for event, details in rows}


def keys_of(value: Any, names: dict[str, str], prefix: str = "") -> set[str]:
    """Dotted keys of nested JSON; ``names`` says which keys below the top stand for a source or group."""
    if isinstance(value, dict) and value:
        inner = {f"{prefix}.{names.get(key, key)}" if prefix else key: item for key, item in value.items()}
        return set().union(*(keys_of(item, names, key) for key, item in inner.items()))
    if isinstance(value, list):
        return keys_of(value[0], names, f"{prefix}[]") if value else {f"{prefix}[]"}
    return {prefix}


def a_manifest(folder: Path) -> Any:
    label = StoreLabel("web", "general", "train", 10, 0, TokenizerFacts("t", "0" * 64, "c"))
    return json.loads(write_split(folder, label, [[[5, 7, 0]]]).to_json())


def a_plan(_: Path) -> Any:
    sources, wishes = [PlanSource("web", "general", 9, 72, "w")], [StageWish(64, 1.0)]
    plan, _warnings = build_plan(sources, wishes, seed=1, seq_len=8, global_batch_rows=4, max_epochs=4)
    return json.loads(plan.to_json())


def a_recommendation(_: Path) -> Any:
    point = PromisePoint(64.0, 2.9, (2.8, 3.0), 2.5, (2.4, 2.6))
    stages = (RecommendedStage(64, 0.25, 0.75),)
    laws, file = LawNames("cmr", "dcpt"), ObservationsFile("observations.csv", "ab")
    made = Recommendation("tolerance", "", 8e9, 1e-4, stages, (0.2, 0.3), laws, (point,), BaseLoss(2.8, 3.0), file)
    return json.loads(made.to_json())


def an_eval(folder: Path) -> Any:
    sources = {"web": SourceEval("general", 2.0, 1.0, 7.4, 100, 1)}
    write_eval(folder / "step_00000000.json", EvalRecord(0, 0, sources, aggregate(sources)))
    return json.loads((folder / "step_00000000.json").read_text())


def a_suite_record(folder: Path) -> Any:
    one = {"web": Measured(0.5, 0.1)}
    tasks = {"web": TaskResult("general", "cloze", "acc", True, 0.5, 0.1, one, 9, 0, 0, 0.5, 0.1, 0, "ab", 1.0)}
    probe = CopyingProbe(0.5, 0.1, 0.9, 0.1, 8, 32, one)
    names = ("exam", "ab", 0, 0, "cd", "ef", "fp32", "lm_eval")
    write_suite_record(folder / "r.json", SuiteRecord(*names, tasks, group_scores(tasks), probe, ("none",)))
    return json.loads((folder / "r.json").read_text())


def a_metrics_line(_: Path) -> Any:
    written: list[Any] = []

    class Kept:
        write = staticmethod(written.append)

        def close(self) -> None: ...

    hook = MetricsHook([Kept()], 1, Throughput(64, 1.0, 1.0, None), lambda step: {"web": step * 64})
    hook(StepInfo(1, 64, {"web": 2.0}, {"web": 1}, 0.1, 1.0, 0.5, {"data": 0.1}))
    return written[0]


def an_environment(_: Path) -> Any:
    return environment(Topology(0, 1, torch.device("cpu")))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "manifest.json": a_manifest,
    "plan.json": a_plan,
    "recommendation.json": a_recommendation,
    "evals/step_N.json": an_eval,
    "metrics.jsonl": a_metrics_line,
    "environment.json": an_environment,
    "meta.json": lambda _: dict.fromkeys((field.name for field in fields(CheckpointMeta)), 0),
}


def a_stage_summary(folder: Path) -> Any:
    (folder / "in.jsonl").write_text('{"text": "kept"}\nnot json\n')
    request = StageRequest("clean", (str(folder / "in.jsonl"),), folder / "out", {}, make_step=lambda: lambda _: None)
    summary = run_stage(request)
    return summary | {"identity": 1, "reasons": {"general": next(iter(summary["reasons"].values()))}}


def a_view(folder: Path) -> Any:
    a_manifest(folder / "store" / "train")
    a_manifest(folder / "store" / "heldout")
    make_view(folder / "store", folder / "view", Choice(min_length=1))
    return json.loads((folder / "view" / "train" / "view.json").read_text()) | {"rule": 1}


def an_index(folder: Path) -> Any:
    a_manifest(folder / "train")
    index = ensure_index(TokenStore.open(folder / "train"), 4)
    return json.loads((index.path / "index.json").read_text())


def an_extension(folder: Path) -> Any:
    write_extension(folder, VocabularyExtension("a", "0" * 64, "1" * 64, 10, ((1, 2),)))
    return json.loads((folder / "extension.json").read_text()) | {"subtokens": []}


def skipped_rows(folder: Path) -> Any:
    write_skipped(folder / "skipped_rows.json", [SkippedRow(7, "law", 12, 3, None, "a test")])
    return json.loads((folder / "skipped_rows.json").read_text())


def a_heartbeat(folder: Path) -> Any:
    write_beat(folder, Beat(0, "node7", 4711))
    return json.loads((folder / "rank_00000.json").read_text())


WITHOUT_EXCERPT: dict[str, Callable[[Path], Any]] = {
    "evals/step_N.documents.parquet": lambda _: dict.fromkeys(PIECES.names, 0),
    "evals/SUITE/step_N.json": a_suite_record,
    "evals/SUITE/step_N.items.parquet": lambda _: dict.fromkeys(ITEMS.names, 0),
    "evals/SUITE/texts.parquet": lambda _: dict.fromkeys(TEXTS.names, 0),
    "heartbeats/rank_N.json": a_heartbeat,
    "skipped_rows.json": skipped_rows,
    "summary.json": a_stage_summary,
    "view.json": a_view,
    "index.json": an_index,
    "extension.json": an_extension,
}


@pytest.mark.parametrize("name", [*WRITERS, *WITHOUT_EXCERPT])
def test_the_documented_keys_are_those_the_code_writes(name: str, tmp_path: Path) -> None:
    found = (WRITERS | WITHOUT_EXCERPT)[name](tmp_path)
    names = dict.fromkeys(("web", "general", "domain"), "REASON" if name == "summary.json" else "NAME")
    names |= dict.fromkeys(PHASES, "PHASE") if name == "metrics.jsonl" else {}
    assert documented_keys(name) == keys_of(found, names)


def test_the_documented_events_are_those_the_code_writes() -> None:
    files = [path for folder in ("cpt", "launch") for path in (ROOT / folder).rglob("*.py")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    called = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    writers = {"event", "note_event", "_note", "_warn"}
    calls = [n for n in called if n.args and writers & {getattr(n.func, "attr", ""), getattr(n.func, "id", "")}]
    written: dict[str, set[str]] = {}
    for call in calls:
        given = [n for argument in call.args[:2] for n in ast.walk(argument)]  # the name comes first, or after a job
        names = [n.value for n in given if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        for name in names:  # details given as **mapping are compared in a real run's file
            written.setdefault(name, set()).update(keyword.arg for keyword in call.keywords if keyword.arg)
    rows = event_rows()
    assert rows.keys() == written.keys()
    assert all(details <= rows[name] for name, details in written.items())


def test_excerpts_have_the_documented_keys() -> None:
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    found = {match["excerpt"]: match["body"] for match in FENCE.finditer(text) if match["excerpt"]}
    assert found.keys() >= WRITERS.keys() - {"meta.json"}
    rows = event_rows()
    for line in found.pop("events.jsonl").splitlines():
        event = json.loads(line)
        assert event.keys() == {"time", "step", "event"} | rows[event["event"]]
    names = dict.fromkeys(("prose", "code", "general", "domain"), "NAME") | dict.fromkeys(PHASES, "PHASE")
    for name, body in found.items():
        if name in WRITERS:
            assert keys_of(json.loads(body), names) == documented_keys(name), name


def test_run_folder_paths_are_the_ones_in_use() -> None:
    rundir = RunDir(Path("run"))
    paths = {value.name for key, value in vars(rundir).items() if key != "root"}
    assert paths <= {name.split("/")[0] for name in documented_keys("Run folder")}


# --- numbers, links and names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_measured_numbers_are_those_of_the_result_files(page: Path) -> None:
    script = load_script(ROOT / "docs" / "fill_numbers.py")
    text = page.read_text(encoding="utf-8")
    assert text == script.filled(text), "numbers differ from benchmarks/results: python docs/fill_numbers.py"
    assert len(script.MARKER.findall(text)) == text.count("<!-- measured:"), "a marker is broken over two lines"


def test_a_missing_result_shows_a_dash_and_a_measured_one_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load_script(ROOT / "docs" / "fill_numbers.py")
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    text = "| 7.0<!-- measured: a.json x/1M (q)/y .1f --> s |"
    assert script.filled(text).startswith("| –<!--")  # noqa: RUF001
    (tmp_path / "a.json").write_text('{"x": {"1M (q)": {"y": 2.25}}, "z": [1, {"w": 3}]}')
    assert script.filled(text) == text.replace("7.0", "2.2")
    assert script.filled("0<!-- measured: a.json z/1/w d -->").startswith("3<!--")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_paths_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    named = re.findall(r"`((?:cpt|data_tools|launch|configs|docs|tests)/[\w./]+|benchmarks/\w+\.py)`", text)
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_the_tree_in_the_readme_names_what_exists() -> None:
    tree = next(body for body in blocks(ROOT / "README.md", "text") if body.startswith("cpt/"))
    folder = Path()
    for line in tree.splitlines():
        for name in re.findall(r"^\s*(?:[\w.]+(?:/|\.py)\s*)+", line)[0].split():
            place = folder / name if line.startswith("  ") else Path(name)
            assert (ROOT / place).exists(), f"{place} is in the README's tree"
        folder = folder if line.startswith("  ") else Path(line.split()[0])
