"""The shape of the tree, checked: who may import whom, what needs no torch, how large things are, what nothing may call."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from itertools import groupby, pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cpt", "data_tools", "launch")

# From the ground. An entry stands for everything below it; the longest one counts.
FLOORS = (
    (
        *("cpt.rundir", "cpt.config", "cpt.run_fields", "cpt.run_rules", "cpt.problems", "cpt.schedule_fields"),
        *("cpt.follow", "cpt.recommendation", "cpt.plan", "cpt.json_fields", "cpt.quotas"),
        *("cpt.plan_frozen", "cpt.plan_parts", "cpt.plan_words", "cpt.mix_fields", "cpt.mix_schedules", "cpt.mixtures"),
        *("cpt.heartbeats", "cpt.folder_lock", "cpt.exit_codes"),
    ),
    # What evaluations measured and what follows from it, files only: training, report and gate share it.
    ("cpt.eval.records", "cpt.eval.results", "cpt.eval.significance", "cpt.eval.document_pieces", "cpt.eval.gate"),
    ("cpt.eval.suite", "cpt.eval.retention", "cpt.eval.pairing", "cpt.eval.document_texts"),
    ("cpt.eval.comparison_rows", "cpt.eval.stability", "cpt.eval.domain_sequence", "cpt.eval.item_diff"),
    ("cpt.eval.document_losses",),
    ("cpt.eval.comparing",),
    ("cpt.data", "cpt.checkpoint", "cpt.report", "launch"),
    ("launch.local",),
    ("launch.hosts", "launch.kube"),
    ("launch.preflight",),
    ("launch.slurm",),
    ("cpt.model", "cpt.train", "data_tools"),
    ("cpt.planner", "cpt.eval", "cpt.world_rules", "cpt.suite_rules"),
    ("cpt.prepare", "cpt.failures", "cpt.fit_memory"),
    ("cpt.runfolder", "cpt.announce", "cpt.new_tokens", "cpt.rate_curve"),
    ("cpt.remix", "cpt.live_run", "cpt.run_model", "cpt.resumption"),
    ("cpt.run_saving", "cpt.run_evaluation", "cpt.run_benchmarks", "cpt.run_watch", "cpt.run_numbers", "cpt.extend"),
    ("cpt.run_guard", "cpt.run_rehearsal"),
    ("cpt.run",),
    ("cpt.ckpt_facts", "cpt.ckpt_convert"),
    ("cpt.offline",),  # verbs on finished runs: they take a run's objects without its loop
    ("cpt.eval_checkpoints",),
    ("cpt.quickstart_runs", "cpt.quickstart_crew"),
    ("cpt.quickstart", "cpt.plan_cli", "cpt.eval_watching"),
    ("cpt.cli_options", "cpt.launch_pilots", "cpt.eval_tables"),
    ("cpt.ckpt_cli", "cpt.store_cli", "cpt.vocabulary_cli", "cpt.cluster_cli", "cpt.launch_cli", "cpt.doctor_cli"),
    ("cpt.data_cli", "cpt.eval_cli"),
    # The two entry points. cpt.train.main lies in train/ because `deepspeed --module` names it, yet starts a whole run.
    ("cpt.cli", "cpt.train.main"),
)
# On one floor entries do not know each other, except for these: the left one is built on the right one.
NEIGHBOURS = {
    ("cpt.config", "cpt.problems"),
    ("cpt.config", "cpt.schedule_fields"),
    ("cpt.config", "cpt.run_fields"),
    ("cpt.config", "cpt.run_rules"),
    ("cpt.config", "cpt.follow"),
    ("cpt.run_fields", "cpt.schedule_fields"),
    ("cpt.run_rules", "cpt.run_fields"),
    ("cpt.run_rules", "cpt.problems"),
    ("cpt.run_rules", "cpt.mix_fields"),
    ("cpt.follow", "cpt.problems"),
    ("cpt.follow", "cpt.recommendation"),
    ("cpt.follow", "cpt.rundir"),
    ("cpt.follow", "cpt.schedule_fields"),
    ("cpt.recommendation", "cpt.json_fields"),
    ("cpt.recommendation", "cpt.rundir"),
    ("cpt.run_fields", "cpt.mix_fields"),
    ("cpt.mix_fields", "cpt.schedule_fields"),
    ("cpt.mix_schedules", "cpt.mix_fields"),
    ("cpt.mix_schedules", "cpt.plan_parts"),
    ("cpt.mix_schedules", "cpt.quotas"),
    ("cpt.mix_schedules", "cpt.rundir"),
    ("cpt.mixtures", "cpt.mix_schedules"),
    ("cpt.mixtures", "cpt.plan"),
    ("cpt.mixtures", "cpt.plan_parts"),
    ("cpt.mixtures", "cpt.run_fields"),
    ("cpt.plan", "cpt.plan_frozen"),
    ("cpt.plan_frozen", "cpt.json_fields"),
    ("cpt.plan_frozen", "cpt.plan_parts"),
    ("cpt.plan_frozen", "cpt.quotas"),
    ("cpt.plan_frozen", "cpt.rundir"),
    ("cpt.plan", "cpt.plan_parts"),
    ("cpt.plan", "cpt.plan_words"),
    ("cpt.plan", "cpt.quotas"),
    ("cpt.plan", "cpt.rundir"),
    ("cpt.plan_parts", "cpt.json_fields"),
    ("cpt.plan_parts", "cpt.rundir"),
    ("cpt.json_fields", "cpt.rundir"),
    ("cpt.cli", "cpt.train.main"),
    ("cpt.train", "cpt.model"),
}
TORCH_FREE = (
    *("cpt.eval.cache", "cpt.eval.harness", "cpt.eval.overlap_list", "cpt.eval.task_files", "cpt.eval_checkpoints"),
    *("cpt.eval.best", "cpt.eval.claims", "cpt.eval.remote_run", "cpt.eval.tries", "cpt.eval.watch"),
    *("cpt.eval.watched_run", "cpt.eval.wandb_records", "cpt.folder_lock", "cpt.train.wandb_sink"),
    "cpt.cli",
    "cpt.config",
    "cpt.data.packing",
    "cpt.data.sampler",
    "cpt.data.token_store",
    "cpt.eval.gate",
    "cpt.eval.run_metrics",
    "cpt.eval.suite_draft",
    "cpt.eval_cli",
    "cpt.eval_tables",
    "cpt.exit_codes",
    "cpt.eval.comparing",
    "cpt.eval.comparison_rows",
    "cpt.eval.document_losses",
    "cpt.eval.document_pieces",
    "cpt.eval.document_texts",
    "cpt.eval.domain_sequence",
    "cpt.eval.item_diff",
    "cpt.eval.pairing",
    "cpt.eval.records",
    "cpt.eval.results",
    "cpt.eval.retention",
    "cpt.eval.significance",
    "cpt.eval.stability",
    "cpt.eval.suite",
    "cpt.extend",
    "cpt.failures",
    "cpt.fit_memory",
    "cpt.heartbeats",
    "cpt.mix_fields",
    "cpt.mix_schedules",
    "cpt.mixtures",
    "cpt.model.memory",
    "cpt.model.size",
    "cpt.new_tokens",
    "cpt.plan",
    "cpt.planner",
    "cpt.prepare",
    "cpt.problems",
    "cpt.recommendation",
    "cpt.rate_curve",
    "cpt.remix",
    "cpt.report",
    "cpt.rundir",
    "cpt.schedule_fields",
    "cpt.train.schedules",
    "data_tools",
    "launch",
)


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


MODULES = {module_of(path): path for path in python_files(*PACKAGES)}


def imported_names(path: Path) -> Iterator[str]:
    """Every module a file imports, inside functions too; ``from a import b`` gives ``a.b`` if that is a module, else ``a``."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}:{node.lineno}: imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def own_imports(module: str) -> set[str]:
    return {name for name in imported_names(MODULES[module]) if name.split(".")[0] in PACKAGES}


def unit_of(module: str) -> str:
    """The entry of FLOORS that a module belongs to."""
    entries = [entry for floor in FLOORS for entry in floor if module == entry or module.startswith(f"{entry}.")]
    assert entries, f"{module} stands on no floor: give it one in FLOORS"
    return max(entries, key=len)


def floor_of(module: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if unit_of(module) in floor)


def packages_only(module: str) -> bool:
    return MODULES[module].name == "__init__.py"


def test_imports_point_down_only() -> None:
    wrong = []
    for module in MODULES:
        for target in own_imports(module):
            here, there = unit_of(module) if not packages_only(module) else "", unit_of(target)
            allowed = here == there or floor_of(there) < floor_of(here) or (here, there) in NEIGHBOURS
            if not allowed:
                wrong.append(f"{module} (floor {floor_of(module)}) imports {target} (floor {floor_of(target)})")
    assert not wrong, "\n".join(wrong)


def test_no_exception_among_neighbours_is_left_over() -> None:
    used = {
        (unit_of(module), unit_of(target))
        for module in MODULES
        if not packages_only(module)
        for target in own_imports(module)
    }
    assert used >= NEIGHBOURS, f"no longer imported: {NEIGHBOURS - used}"


def test_there_are_no_import_cycles() -> None:
    graph = {module: own_imports(module) for module in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"cycle: {' -> '.join((*path[path.index(module) :], module))}"
        if module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def torch_free_modules() -> list[str]:
    return [m for m in MODULES if any(m == entry or m.startswith(f"{entry}.") for entry in TORCH_FREE)]


def test_login_node_modules_import_where_torch_is_missing() -> None:
    program = f"""
import importlib, sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "deepspeed"):
            raise ModuleNotFoundError(f"No module named {{name!r}} here", name=name)

sys.meta_path.insert(0, NoTorch())
failed = []
for name in {torch_free_modules()!r}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed.append(f"{{name}}: {{error}}")
print("\\n".join(failed))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_only_the_engine_imports_deepspeed() -> None:
    users = [str(path.relative_to(ROOT)) for path in MODULES.values() if "deepspeed" in roots_imported(path)]
    assert users == ["cpt/train/engine.py"]


def roots_imported(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_names(path)}


def test_files_have_at_most_400_lines() -> None:
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in MODULES.values()}
    assert not {name: length for name, length in lengths.items() if length > 400}


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def test_functions_have_at_most_60_lines_and_few_exceed_35() -> None:
    lengths = {f"{name}.{f.name}": num_lines(f) for name, path in MODULES.items() for f in functions(path)}
    assert not {name: length for name, length in lengths.items() if length > 60}
    assert sorted(lengths.values())[int(0.9 * len(lengths))] <= 35


def test_every_signature_is_annotated_and_every_module_says_what_it_owns() -> None:
    for name, path in MODULES.items():
        if not packages_only(name):
            assert ast.get_docstring(tree_of(path)), f"{name} has no docstring"
        for function in functions(path):
            arguments = function.args
            given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            bare = [a.arg for a in given if a and a.annotation is None and a.arg not in ("self", "cls")]
            assert not bare and function.returns is not None, f"{name}.{function.name}: not annotated"


def test_no_module_hides_a_standard_or_third_party_package() -> None:
    taken = set(sys.stdlib_module_names) | {name for name in packages_distributions() if name.isidentifier()}
    own = {path.stem for path in MODULES.values()} | {path.parent.name for path in MODULES.values()}
    # Ours by necessity: `cpt`, `data_tools` and `launch` are installed themselves; __init__ names no module.
    hidden = (own & taken) - {"__init__", *PACKAGES}
    assert not hidden


def test_package_files_are_empty_and_the_tests_are_no_package() -> None:
    assert not [str(path) for path in python_files(*PACKAGES) if path.name == "__init__.py" and path.stat().st_size]
    assert not [str(path) for path in python_files("tests") if path.name == "__init__.py"]


def test_test_files_have_names_of_their_own() -> None:
    names = sorted(path.name for path in python_files("tests") if path.name != "conftest.py")
    assert not [a for a, b in pairwise(names) if a == b]


def test_nothing_happens_at_import() -> None:
    """At module level: definitions, imports, constants. No loose calls, loops or prints."""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    calm = (ast.Import, ast.ImportFrom, *definitions, ast.Assign, ast.AnnAssign)
    for name, path in MODULES.items():
        for node in tree_of(path).body:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            guarded = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'")
            registers = isinstance(node, ast.Expr) and name.endswith("cli") and "add_typer" in ast.unparse(node)
            assert isinstance(node, calm) or is_docstring or guarded or registers, (
                f"{path}:{node.lineno}: {ast.unparse(node)}"
            )


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    return ((ast.unparse(node.func), node) for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call))


def dangerous(name: str, call: ast.Call) -> str:
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"):
        return "yaml.safe_load reads untrusted files"
    if name in ("os.system", "os.popen", "subprocess.getoutput") or given.get("shell", "False") != "False":
        return "give an argument list, no shell"
    if name == "torch.load" and given.get("weights_only") != "True":
        return "torch.load without weights_only=True runs code of the file"
    if given.get("allow_pickle", "False") != "False" or name in ("eval", "exec"):
        return "runs code of its input"
    return ""


def test_nothing_runs_code_that_comes_with_data() -> None:
    found = []
    for path in python_files(*PACKAGES, "benchmarks", "tests"):
        found += [f"{path}:{call.lineno}: {why}" for name, call in calls(path) if (why := dangerous(name, call))]
        if path in MODULES.values():
            pickles = roots_imported(path) & {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
            found += [f"{path}: imports {name}" for name in pickles]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "yaml.load(text)",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
    ],
)
def test_the_check_above_sees_what_it_is_for(line: str) -> None:
    call = ast.parse(line).body[0].value  # type: ignore[attr-defined]
    assert dangerous(ast.unparse(call.func), call)


def attributes_read(path: Path) -> set[tuple[str, str]]:
    """(name before the last dot, last name) of every ``x.y.field`` that is read: ``config.train.tokens`` -> (train, tokens)."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
            found.add((name, node.attr))
    return found


FIELD_FILES = ("cpt.run_fields", "cpt.schedule_fields", "cpt.mix_fields")


def config_fields() -> list[tuple[str, str]]:
    from pydantic import BaseModel

    from cpt import mix_fields, run_fields, schedule_fields

    sections = [
        kind
        for module in (run_fields, schedule_fields, mix_fields)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, BaseModel) and kind.__module__ == module.__name__
    ]
    return [
        (kind.__name__, field) for kind in sections for field in kind.model_fields if kind is not run_fields.RunConfig
    ]


def test_every_config_field_is_read_somewhere() -> None:
    """Outside the file that declares it; a section's own derived values (``run_dir``) count as the rest of the code."""
    properties = re.findall(r"self\.(\w+)\.(\w+)", MODULES["cpt.run_fields"].read_text())
    elsewhere = [path for name, path in MODULES.items() if name not in FIELD_FILES]
    read = set().union(*(attributes_read(path) for path in elsewhere), properties)
    section_names = {"Section", "BaseModel"}
    unread = []
    for section, field in config_fields():
        owner = section.removesuffix("Section").lower()
        holders = {owner, "section", "spec"} if "Section" in section else {"schedule"}
        holders |= {"past"} if section == "PastRates" else set()
        holders |= {"mix", "mixture", "point", "part", "past"} if "Mix" in section or owner == "stage" else set()
        names = {name for name, attribute in read if attribute == field}
        if section not in section_names and not names & holders:
            unread.append(f"{section}.{field}")
    assert not unread


def test_the_config_has_at_most_120_fields() -> None:
    """Counted with the parameters of every schedule and mixture, of which a run file has one of each."""
    assert 40 < len(config_fields()) <= 120


def tracked_files() -> list[Path]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    machine = re.compile(rb"(?<![\w.<{}$*-])/(work|root|home|Users)/\w")
    found = []
    for path in tracked_files():
        content = path.read_bytes()
        if b"\0" not in content[:4096]:
            found += [f"{path.relative_to(ROOT)}: {match.group().decode()}" for match in machine.finditer(content)]
    assert not found, "\n".join(found)


def test_at_most_20_todos_are_open() -> None:
    marks = [path for path in MODULES.values() for _ in re.finditer(r"\b(TODO|FIXME|XXX)\b", path.read_text())]
    assert len(marks) <= 20, {str(path): len(list(group)) for path, group in groupby(sorted(marks))}
