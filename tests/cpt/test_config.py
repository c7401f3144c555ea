"""The run file: values mean what they say, every problem is reported at once, and nothing unsafe gets in."""

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cpt.config import ConfigError, RunConfig, apply_override, json_schema, load_config, to_yaml, validate
from cpt.recommendation import write_recommendation

RAW: dict[str, Any] = {
    "run": {"name": "demo"},
    "model": {"fresh": {"model_type": "llama"}},
    "data": {"stores": {"general": "stores/general", "medical": "stores/medical"}, "seq_len": 8},
    "train": {"tokens": 1600, "global_batch_tokens": 16, "micro_batch_size": 1, "peak_lr": 1e-3},
}


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(RAW))
    return path


def changed(*overrides: str) -> dict[str, Any]:
    raw = deepcopy(RAW)
    for override in overrides:
        apply_override(raw, override)
    return raw


def refused(*overrides: str) -> dict[str, str]:
    """By field: what is said of it."""
    with pytest.raises(ConfigError) as caught:
        validate(changed(*overrides))
    return {problem.field: str(problem) for problem in caught.value.problems}


def test_a_small_run_file_is_enough_and_defaults_fill_the_rest(run_file: Path) -> None:
    config = load_config(run_file)
    assert config.train.betas == (0.9, 0.95) and config.train.schedule.name == "rewarm_cosine"
    assert config.global_batch_rows == 2 and config.deepspeed.zero_stage == 0


def test_every_problem_is_reported_at_once_with_field_value_and_rule() -> None:
    problems = refused(
        "train.peak_lr=7",
        "train.tokens=abc",
        "data.seqlen=4",
        "train.betas=[1, 2]",
        "run.name=a/b",
        "replay.share_general=2",
    )
    assert set(problems) == {
        "train.peak_lr",
        "train.tokens",
        "data.seqlen",
        "train.betas.0",
        "train.betas.1",
        "run.name",
        "replay.share_general",
    }
    assert problems["train.peak_lr"] == "train.peak_lr = 7: input should be less than 1; highest learning rate"
    assert "'abc'" in problems["train.tokens"] and "integer" in problems["train.tokens"]


def test_wrong_fields_and_broken_rules_between_others_come_together() -> None:
    problems = refused("train.peak_lr=7", "model.init_from=somewhere", "train.global_batch_tokens=20")
    assert problems["model"].startswith("model: give exactly one of model.init_from and model.fresh")
    assert "multiple of data.seq_len (8); the nearest is 16" in problems["train.global_batch_tokens"]
    assert "train.peak_lr" in problems and len(problems) == 3


def test_a_rule_is_not_checked_on_fields_that_are_wrong_themselves() -> None:
    assert set(refused("train.global_batch_tokens=-3")) == {"train.global_batch_tokens"}


@pytest.mark.parametrize(
    ("field", "nearest"),
    [
        ("data.seqlen", "data.seq_len"),
        ("train.peek_lr", "train.peak_lr"),
        ("eval.at_step", "eval.at_steps"),
        ("evals", "eval"),
        ("train.zero_stage", "deepspeed.zero_stage"),  # right name, wrong section
        ("peak_lr", "train.peak_lr"),
        ("train.schedule.warmup_step", "train.schedule.warmup_steps"),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest_known_name(field: str, nearest: str) -> None:
    assert f"unknown field; did you mean {nearest}?" in refused(f"{field}=3")[field]


def test_a_field_like_no_other_is_pointed_to_the_schema() -> None:
    assert "cpt config schema lists the fields" in refused("train.zzz=1")["train.zzz"]


def test_a_missing_field_says_what_it_is_for() -> None:
    raw = changed()
    del raw["train"]["micro_batch_size"]
    with pytest.raises(ConfigError, match=r"train\.micro_batch_size: is required; rows per rank"):
        validate(raw)


@pytest.mark.parametrize(
    ("text", "value"),
    [("20e9", 20_000_000_000), ('"1_000_000"', 1_000_000), ("1_000_000", 1_000_000), ("1.6e3", 1600), ("1600.0", 1600)],
)
def test_whole_numbers_may_be_written_as_people_write_them(text: str, value: int) -> None:
    assert validate(changed(f"train.tokens={text}")).train.tokens == value


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("3.0e-4", 3e-4), ("5E-5", 5e-5), ("0.01", 0.01)])
def test_rates_are_read_with_and_without_a_decimal_point(text: str, value: float) -> None:
    assert validate(changed(f"train.peak_lr={text}")).train.peak_lr == value


@pytest.mark.parametrize(
    "text", ["2.5", "1e400", ".inf", ".nan", "-8", "0", "true", "yes", "null", "[1]", '""', "1e", "8 tokens"]
)
def test_what_is_no_positive_whole_number_is_refused(text: str) -> None:
    assert "eval.tokens_per_source" in refused(f"eval.tokens_per_source={text}")


@pytest.mark.parametrize("text", [".nan", ".inf", "0", "-1e-3", "1", "abc", "[1e-3]"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    assert "train.peak_lr" in refused(f"train.peak_lr={text}")


def test_overrides_reach_nested_and_new_sections_and_the_last_one_wins() -> None:
    config = validate(
        changed(
            "deepspeed.extra.zero_optimization.overlap_comm=true", "run.seed=1", "run.seed=2", "eval.at_steps=[1, 2]"
        )
    )
    assert config.deepspeed.extra == {"zero_optimization": {"overlap_comm": True}}
    assert config.run.seed == 2 and config.eval.at_steps == (1, 2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("zero_optimization.offload_optimizer", "{device: cpu}"),
        ("zero_optimization.stage", "2"),
        ("zero_optimization.zero_hpz_partition_size", "8"),
        ("gradient_clipping", "1.0"),
        ("optimizer", "{type: SGD}"),
    ],
)
def test_what_a_field_of_ours_says_is_not_said_again_in_the_keys_of_deepspeed(key: str, value: str) -> None:
    assert f"deepspeed.extra.{key}" in refused(f"deepspeed.extra.{key}={value}")


def test_a_field_of_the_default_schedule_can_be_set_alone() -> None:
    schedule = validate(changed("train.schedule.warmup_steps=7")).train.schedule
    assert (schedule.name, schedule.warmup_steps) == ("rewarm_cosine", 7)


@pytest.mark.parametrize("override", ["train.peak_lr", "=3", "train..peak_lr=3", ".x=1", "train.=1", "", "--flag"])
def test_a_malformed_override_is_refused_with_the_form_it_should_have(override: str) -> None:
    with pytest.raises(ConfigError, match=r"an override has the form section\.field=value"):
        apply_override({}, override)


def test_an_override_into_what_is_no_section_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"train\.peak_lr\.x = 0\.001: peak_lr is not a section, so it has no field x"
    ):
        apply_override(deepcopy(RAW), "train.peak_lr.x=3")


@pytest.mark.parametrize(
    "value", ["[1, 2", "{a", "!!python/object/apply:os.getcwd []", "2024-02-30", "9" * 5000, "[" * 5000]
)
def test_an_override_that_is_no_yaml_value_is_refused_by_field(value: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.name = .*: is not a YAML value"):
        apply_override({}, f"run.name={value}")


def test_overrides_file_references_and_fields_are_reported_together(run_file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(run_file, ["oops", "model.fresh=gone.yaml", "train.peak_lr=7"])
    text = str(caught.value)
    assert "oops: an override has" in text and "gone.yaml: no such file" in text and "train.peak_lr = 7" in text


def test_a_missing_file_is_told_with_the_nearest_one(run_file: Path) -> None:
    with pytest.raises(ConfigError, match=rf"ru\.yaml: no such file; did you mean {run_file}\?"):
        load_config(run_file.with_name("ru.yaml"))
    with pytest.raises(ConfigError, match=r"the folder .*nowhere does not exist either"):
        load_config(run_file.parent / "nowhere" / "run.yaml")


@pytest.mark.parametrize("content", [b"- a\n- b\n", b"", b"just text", b"3"])
def test_a_file_without_a_mapping_is_refused(run_file: Path, content: bytes) -> None:
    run_file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.yaml.*: must hold a mapping of sections"):
        load_config(run_file)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00bad", b"run: [1, 2", b"run: {name: 2024-02-30}", b"a: b: c", b"\x00", b"[" * 5000]
)
def test_a_file_that_is_no_utf8_yaml_is_refused_by_name(run_file: Path, content: bytes) -> None:
    run_file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.yaml: cannot be read as YAML"):
        load_config(run_file)


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config(tmp_path)


def test_a_key_that_stands_twice_is_refused_with_its_line(run_file: Path) -> None:
    run_file.write_text("run: {name: a}\ntrain:\n  peak_lr: 1e-3\n  seed: 1\n  peak_lr: 2e-3\n")
    with pytest.raises(ConfigError, match=r"peak_lr stands twice(.|\n)*line 5"):
        load_config(run_file)


def test_yaml_that_would_run_code_is_refused_and_does_not_run(run_file: Path) -> None:
    trap = run_file.with_name("trap")
    run_file.write_text(
        f'run: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ["{trap}"]]\n'
    )
    with pytest.raises(ConfigError, match="could not determine a constructor for the tag"):
        load_config(run_file)
    assert not trap.exists()


@pytest.mark.parametrize("name", ["a/b", "../up", "..", ".hidden", "/abs", "", "a b", "a\\b", "a\n", "-rf"])
def test_a_run_name_that_could_leave_its_folder_is_refused(name: str) -> None:
    assert "run.name" in refused(f"run.name={json.dumps(name)}")


@pytest.mark.parametrize(
    "override", ["data.stores={2020-01-01: x}", "run.x={2020-01-01: 3}", "model.fresh={1: 2}", "data.stores={1: x}"]
)
def test_keys_that_are_no_text_are_problems_and_no_crash(override: str) -> None:
    assert refused(override, "train.peak_lr=7").keys() > {"train.peak_lr"}


@pytest.mark.parametrize("value", ["null", "[1]", "3", "text"])
@pytest.mark.parametrize("section", ["run", "model", "data", "train", "replay", "deepspeed", "train.schedule"])
def test_anything_but_a_mapping_is_refused_as_a_section(
    section: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RAW))
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "run.yaml", [f"{section}={value}"])
    assert section in {problem.field for problem in caught.value.problems}


def test_a_source_may_be_named_like_a_schedule() -> None:
    assert set(refused("data.stores={constant: 3}")) == {"data.stores.constant"}


def test_one_wrong_value_is_one_problem() -> None:
    assert list(refused("model.fresh=3")) == ["model.fresh"]


def test_run_dir_may_not_be_null(run_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.dir"):
        load_config(run_file, ["run.dir=null"])


@pytest.mark.parametrize(
    ("overrides", "field", "says"),
    [
        (["model.fresh=null"], "model", "exactly one"),
        (["train.tokens=8"], "train.tokens", "less than one step"),
        (["data.stages=[{tokens: 800, share_general: 0.5}]"], "data.stages", r"must add up to train.tokens (1600)"),
        (
            ["data.stages=[{tokens: 1600, share_general: 0.5}]", "replay.share_general=0.2"],
            "replay.share_general",
            "remove one of the two",
        ),
        (["data.weights={medicl: 1}"], "data.weights", "names no source of data.stores (['general', 'medical'])"),
        (
            ["train.schedule={name: wsd, warmup_steps: 60, decay_steps: 60}"],
            "train.schedule",
            "add up to 120 steps but the run has 100",
        ),
        (["train.schedule={name: wsd}"], "train.schedule.decay_steps", "is required"),
        (["train.schedule={name: cosine}"], "train.schedule", "'rewarm_cosine', 'constant'"),
        (["deepspeed.zero_stage=4"], "deepspeed.zero_stage", "0, 1, 2 or 3"),
        (["checkpoint.keep_last=0"], "checkpoint.keep_last", "greater than or equal to 1"),
        (["data.stores={}"], "data.stores", "at least 1 item"),
        (["deepspeed.offload=cpu"], "deepspeed.offload", "needs sharded state"),
        (["deepspeed.offload=nvme", "deepspeed.zero_stage=2"], "deepspeed.offload", "under ZeRO 3 only"),
        (
            ["deepspeed.offload=nvme", "deepspeed.zero_stage=3"],
            "deepspeed.nvme_dir",
            "goes with deepspeed.offload=nvme",
        ),
        (["deepspeed.nvme_dir=/fast", "deepspeed.zero_stage=3"], "deepspeed.nvme_dir", "and that with it"),
        (["deepspeed.hpz_size=4", "deepspeed.zero_stage=2"], "deepspeed.hpz_size", "is a part of ZeRO 3"),
        (["deepspeed.quantized_communication=true"], "deepspeed.quantized_communication", "is a part of ZeRO 3"),
        (["train.compile=true", "deepspeed.zero_stage=3"], "train.compile", "gather weights in the middle of a block"),
        (["train.compile=true", "train.activation_checkpointing=selective"], "train.compile", "by itself what to keep"),
    ],
)
def test_each_rule_names_its_field_and_what_it_wants(overrides: list[str], field: str, says: str) -> None:
    problems = refused(*overrides)
    assert list(problems) == [field] and says in problems[field]


def test_a_long_wrong_value_is_shortened_in_the_message() -> None:
    assert len(refused(f"train.peak_lr={'x' * 10_000}")["train.peak_lr"]) < 400


def test_relative_paths_become_absolute_and_hub_names_stay(run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "small.yaml").write_text("model_type: qwen2\n")
    config = load_config(run_file, ["run.dir=out", "model.tokenizer=base", "model.fresh=small.yaml"])
    assert config.run_dir == tmp_path / "out" / "demo"
    assert config.data.stores["general"] == tmp_path / "stores" / "general"
    assert config.model.tokenizer == str(tmp_path / "base") and config.model.fresh == {"model_type": "qwen2"}
    hub = load_config(run_file, ["model.fresh=null", "model.init_from=org/name", "data.stores.medical=/elsewhere/x"])
    assert hub.model.init_from == "org/name" and hub.data.stores["medical"] == Path("/elsewhere/x")
    assert hub.run_dir == tmp_path / "runs" / "demo"


SCHEDULES = st.sampled_from(
    [
        {"name": "rewarm_cosine"},
        {"name": "constant", "warmup_steps": 3},
        {"name": "linear_to_zero"},
        {"name": "wsd", "decay_steps": 5, "decay": "square"},
        {"name": "infinite_cosine", "warmup_steps": 1, "cooldown_steps": 2, "constant_steps": 3},
        {"name": "infinite_inv_sqrt", "warmup_steps": 1, "cooldown_steps": 0, "constant_steps": 3, "timescale": 2.5},
    ]
)


@given(
    schedule=SCHEDULES,
    peak_lr=st.floats(1e-300, 0.999),
    seed=st.integers(0, 2**63 - 1),
    share=st.none() | st.floats(0, 1),
    weights=st.dictionaries(st.sampled_from(["general", "medical"]), st.floats(0, 1e300)),
    extra=st.dictionaries(
        st.text(max_size=4), st.none() | st.booleans() | st.integers() | st.text(max_size=4), max_size=3
    ),
)
def test_the_resolved_file_reads_back_as_the_same_config(
    schedule: dict[str, Any],
    peak_lr: float,
    seed: int,
    share: float | None,
    weights: dict[str, float],
    extra: dict[str, Any],
) -> None:
    raw = deepcopy(RAW)
    raw["train"] |= {"schedule": schedule, "peak_lr": peak_lr}
    raw["run"]["seed"], raw["replay"], raw["data"]["weights"] = seed, {"share_general": share}, weights
    raw["deepspeed"] = {"extra": extra}
    config = validate(raw)
    again = validate(yaml.safe_load(to_yaml(config)))
    assert again == config and to_yaml(again) == to_yaml(config)


def test_a_config_cannot_be_changed_after_it_was_checked() -> None:
    config = validate(changed())
    with pytest.raises(ValueError, match="frozen"):
        config.train.peak_lr = 1.0  # type: ignore[misc]


def described_fields(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, section in {"RunConfig": schema, **schema["$defs"]}.items():
        for field, details in section.get("properties", {}).items():
            yield f"{name}.{field}", details


def test_the_schema_is_json_and_describes_every_field() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert schema["properties"].keys() == RunConfig.model_fields.keys() and schema["additionalProperties"] is False
    fields = dict(described_fields(schema))
    assert len(fields) > 45
    silent = [name for name, details in fields.items() if not details.get("description") and not name.endswith(".name")]
    assert [name for name in silent if not name.startswith("RunConfig.")] == []


# --- a run file that follows a recommendation

Recommend = Any  # the fixture of tests/cpt/conftest.py


def following(run_file: Path, recommendation: Any, *overrides: str) -> RunConfig:
    write_recommendation(run_file.parent / "plan.json", recommendation)
    return load_config(run_file, ["plan=plan.json", *overrides])


def test_a_recommendation_replaces_the_mixture_and_the_budget_and_says_what_it_replaced(
    run_file: Path, recommend: Recommend
) -> None:
    run_file.write_text(yaml.safe_dump({**RAW, "replay": {"share_general": 0.25}}))
    config = following(run_file, advice := recommend(tokens=3200, share=0.4))
    assert [(stage.tokens, stage.share_general) for stage in config.data.stages] == [(3200, 0.4)]
    assert config.train.tokens == 3200 and config.replay.share_general is None
    assert config.plan is not None and config.plan.path == run_file.parent / "plan.json"
    assert config.plan.fingerprint == advice.fingerprint
    assert config.plan.replaced == {"train.tokens": 1600, "replay.share_general": 0.25}


def test_the_resolved_file_of_a_followed_recommendation_needs_it_no_more(run_file: Path, recommend: Recommend) -> None:
    config = following(run_file, recommend(tokens=3200))
    (run_file.parent / "plan.json").unlink()
    assert validate(yaml.safe_load(to_yaml(config))) == config


def test_a_run_file_may_name_the_recommendation_itself_and_an_override_takes_it_back(
    run_file: Path, recommend: Recommend
) -> None:
    run_file.write_text(yaml.safe_dump({**RAW, "plan": "plan.json"}))
    write_recommendation(run_file.parent / "plan.json", recommend(tokens=3200))
    assert load_config(run_file).train.tokens == 3200
    assert load_config(run_file, ["plan=null"]).train.tokens == 1600


def test_weights_by_source_leave_the_general_share_to_the_stores_labels(run_file: Path, recommend: Recommend) -> None:
    config = following(run_file, recommend(share=None, weights={"general": 0.3, "medical": 0.7}))
    assert config.data.stages[0].share_general is None
    assert config.data.stages[0].weights == {"general": 0.3, "medical": 0.7}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.tokens=1600", "train.tokens = 1600: contradicts plan=plan.json, which says 3200"),
        ("replay.share_general=0.25", "replay.share_general = 0.25: contradicts plan=plan.json, which says 0.4"),
        ("data.stages=[{tokens: 3200, share_general: 0.1}]", "data.stages = "),
    ],
)
def test_an_override_that_contradicts_the_recommendation_is_refused_with_both(
    run_file: Path, recommend: Recommend, override: str, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        following(run_file, recommend(tokens=3200, share=0.4), override)
    assert says in str(caught.value) and "plan=null" in str(caught.value)


def test_an_override_that_agrees_with_the_recommendation_is_no_contradiction(
    run_file: Path, recommend: Recommend
) -> None:
    config = following(run_file, recommend(tokens=3200, share=0.4), "train.tokens=3.2e3", "replay.share_general=0.4")
    assert config.train.tokens == 3200


def test_weights_that_do_not_name_the_runs_stores_are_refused_with_the_names(
    run_file: Path, recommend: Recommend
) -> None:
    with pytest.raises(ConfigError) as caught:
        following(run_file, recommend(share=None, weights={"general": 0.3, "law": 0.7}))
    assert "plan.stages[0].weights: names law, not in data.stores and misses medical of data.stores" in str(
        caught.value
    )


@pytest.mark.parametrize("content", [b"{", b'{"kind": "fit"}', None])
def test_a_recommendation_that_cannot_be_read_is_a_problem_among_the_others(
    run_file: Path, content: bytes | None
) -> None:
    if content:
        (run_file.parent / "plan.json").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(run_file, ["plan=plan.json", "train.peak_lr=7"])
    by_field = {problem.field: str(problem) for problem in caught.value.problems}
    assert set(by_field) == {"plan", "train.peak_lr"} and str(run_file.parent / "plan.json") in by_field["plan"]


def test_a_recommendation_that_changed_since_it_was_pinned_is_refused(run_file: Path, recommend: Recommend) -> None:
    first = to_yaml(following(run_file, recommend(tokens=3200)))
    run_file.write_text(first)
    write_recommendation(run_file.parent / "plan.json", later := recommend(tokens=4800))
    with pytest.raises(ConfigError, match=f"is another recommendation now, {later.fingerprint}"):
        load_config(run_file)
    assert load_config(run_file, ["plan.fingerprint=null"]).train.tokens == 4800


@pytest.mark.parametrize("override", ["plan=3", "plan=[1]", "plan={paths: x}", "train.tokens=true"])
def test_malformed_values_around_a_plan_are_problems_and_no_crash(
    run_file: Path, recommend: Recommend, override: str
) -> None:
    with pytest.raises(ConfigError):
        following(run_file, recommend(), override)


def test_a_stage_states_its_share_or_weights_for_every_source() -> None:
    problems = refused("data.stages=[{tokens: 1600, weights: {general: 1}}]")
    assert "is required, unless weights state the share of every source" in problems["data.stages.0.share_general"]


def test_the_steps_of_a_suite_are_a_grid_or_a_list_within_the_run() -> None:
    assert validate(changed("eval.suite=s.yaml")).eval.suite_steps == "geometric"
    assert validate(changed("eval.suite=s.yaml", "eval.suite_steps=[1, 100]")).eval.suite_steps == (1, 100)
    assert (
        "lies behind the last step, 100"
        in refused("eval.suite=s.yaml", "eval.suite_steps=[1, 101]")["eval.suite_steps"]
    )
    assert "there is no eval.suite" in refused("eval.suite_steps=[1]")["eval.suite_steps"]
    assert refused("eval.suite=s.yaml", "eval.suite_steps=dense").keys() == {"eval.suite_steps"}


def test_the_path_of_a_suite_is_kept_absolute(run_file: Path) -> None:
    assert load_config(run_file, ["eval.suite=suites/a.yaml"]).eval.suite == run_file.parent / "suites/a.yaml"
