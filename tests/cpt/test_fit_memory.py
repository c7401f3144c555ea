"""What fits: the choice among stages and micro-batches, the way from a run file, and what cannot be answered."""

import json
from pathlib import Path
from typing import Any

import pytest

from cpt.config import ConfigError, RunConfig, load_config
from cpt.fit_memory import (
    Device,
    choose,
    fit_facts,
    parse_bytes,
    read_model_mapping,
    run_config_for,
    setting_of,
    settings_that_fit,
)
from cpt.model.memory import predict_memory

Workshop = Any  # the fixtures of tests/conftest.py
ROOT = Path(__file__).parents[2]
ONE_B = ROOT / "configs" / "models" / "llama_1b.yaml"
GB = 10**9


@pytest.fixture
def one_b() -> RunConfig:
    return run_config_for(str(ONE_B), seq_len=4096, gpus=8)


def chosen(config: RunConfig, memory: int, gpus: int = 8) -> list[str]:
    found = fit_facts(config, Device(gpus, memory))["choice"]
    return list(found["overrides"]) if found else []


def test_with_room_to_spare_the_lowest_stage_and_a_full_micro_batch_are_chosen(one_b: RunConfig) -> None:
    assert chosen(one_b, 200 * GB) == ["train.micro_batch_size=4", "deepspeed.zero_stage=0"]


def test_with_less_room_a_higher_stage_keeps_the_micro_batch(one_b: RunConfig) -> None:
    tried = {memory: chosen(one_b, memory * GB) for memory in (200, 60, 52, 48)}
    micro = {memory: int(overrides[0].rpartition("=")[2]) for memory, overrides in tried.items()}
    assert micro[200] == 4 and all(micro[a] >= micro[b] for a, b in zip((200, 60, 52), (60, 52, 48), strict=True))
    for memory, overrides in tried.items():
        assert overrides, memory


def test_recomputation_comes_before_offload_and_both_after_stages(one_b: RunConfig) -> None:
    found = {memory: chosen(one_b, memory * GB) for memory in (18, 12, 9)}
    assert any("train.activation_checkpointing" in " ".join(each) for each in found.values())
    offloaded = [memory for memory, each in found.items() if "deepspeed.offload=cpu" in each]
    assert 18 not in offloaded


def test_what_is_chosen_fits_by_its_own_prediction(one_b: RunConfig) -> None:
    model = read_model_mapping(one_b.model)
    for memory in (20, 40, 80):
        found = choose(one_b, model, Device(8, memory * GB))
        assert found is not None and found.needs.total <= memory * GB


def test_where_nothing_fits_there_is_no_choice(one_b: RunConfig) -> None:
    assert fit_facts(one_b, Device(8, 2 * GB))["choice"] is None


def test_milder_steps_are_proposed_first_and_name_what_changes_alone(one_b: RunConfig) -> None:
    tight = one_b.model_copy(update={"train": one_b.train.model_copy(update={"micro_batch_size": 8})})
    model = read_model_mapping(tight.model)
    offers = settings_that_fit(tight, model, Device(8, 40 * GB))
    assert 2 < len(offers) <= 5
    assert [len(each.overrides) for each in offers] == sorted(len(each.overrides) for each in offers)
    assert all(each.micro_batch_size <= 8 and each.needs.total <= 40 * GB for each in offers)
    assert all("train.micro_batch_size=8" not in each.overrides for each in offers)
    assert settings_that_fit(tight, model, Device(8, GB)) == []
    assert settings_that_fit(tight, {"model_type": "mamba"}, Device(8, 40 * GB)) == []


def test_a_run_file_gives_the_setting_that_deepspeed_is_configured_with(workshop: Workshop) -> None:
    workshop.stores()
    fields = {"deepspeed.zero_stage": 2, "train.activation_checkpointing": "selective"}
    config = load_config(workshop.run_file("run", fields))
    model = read_model_mapping(config.model)
    here = setting_of(config, model, world_size=2, on_gpu=False)
    assert (here.zero_stage, here.grad_accum_steps, here.checkpointing) == (2, 1, "selective")
    assert here.attention == "runs" and here.num_buckets == 1 and here.bucket == 16_000_000
    there = setting_of(config, model, world_size=2, on_gpu=True)
    assert there.attention == "mask" and there.num_buckets == 2 and there.bucket == 8_000_000
    assert predict_memory(model, there) is not None
    extra = load_config(
        workshop.run_file("run", fields | {"deepspeed.extra": {"zero_optimization": {"reduce_bucket_size": 7}}})
    )
    assert setting_of(extra, model, world_size=2, on_gpu=True).bucket == 7


def test_models_are_read_from_mappings_files_and_folders(tmp_path: Path, workshop: Workshop) -> None:
    workshop.stores()
    config = load_config(workshop.run_file("run"))
    mapping = read_model_mapping(config.model)
    assert mapping["model_type"] == "llama"
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(mapping))
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "meta.json").write_text(json.dumps({"model_config": mapping}))
    for origin in ("hf", "checkpoint"):
        section = config.model.model_copy(update={"fresh": None, "init_from": str(tmp_path / origin)})
        assert read_model_mapping(section) == mapping
    (tmp_path / "hf" / "config.json").write_text("[1")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_model_mapping(config.model.model_copy(update={"fresh": None, "init_from": str(tmp_path / "hf")}))


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80 * 10**9), ("79.6GiB", round(79.6 * 2**30)), ("24 gb", 24 * 10**9), ("1000", 1000), ("1TiB", 2**40)],
)
def test_sizes_are_read_with_decimal_and_binary_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "80 apples", "-3GB", "0GB", "80iB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="gpu-memory"):
        parse_bytes(text)


def test_the_verb_prints_a_table_a_line_to_paste_and_json(workshop: Workshop) -> None:
    options = ("--model", ONE_B, "--seq-len", 4096, "--gpus", 8, "--gpu-memory", "80GB")
    done = workshop.cpt("plan", "fit-memory", *options)
    assert done.code == 0, done.text
    assert "train.micro_batch_size=4 deepspeed.zero_stage=0" in done.out and "(" in done.out
    facts = json.loads(workshop.cpt("plan", "fit-memory", *options, "--json").out)
    assert facts["parameters"] == 1_100_048_384 and facts["choice"]["bytes"] <= 80 * GB
    assert {each["zero_stage"] for each in facts["table"]} == {0, 1, 2, 3}
    assert all(each["fits"] == (each["bytes"] <= 80 * GB) for each in facts["table"])


def test_the_verb_takes_a_run_file_with_overrides(workshop: Workshop) -> None:
    workshop.stores()
    file = workshop.run_file("run")
    done = workshop.cpt("plan", "fit-memory", file, "train.global_batch_tokens=512", "--gpus", 2, "--gpu-memory", "8GB")
    assert done.code == 0, done.text
    assert "train.micro_batch_size=8" in done.out


def test_only_what_a_run_file_may_say_is_proposed(workshop: Workshop) -> None:
    workshop.stores()
    sections = {"train.global_batch_tokens": 512, "train.micro_batch_size": 1}
    cases = (
        ({"deepspeed.offload": "nvme", "deepspeed.nvme_dir": "swap", "deepspeed.zero_stage": 3}, {3}),
        ({"deepspeed.offload": "cpu", "deepspeed.zero_stage": 1}, {1, 2, 3}),
        ({"deepspeed.hpz_size": 2, "deepspeed.zero_stage": 3}, {3}),
        ({"train.compile": True}, {0, 1, 2}),
    )
    for fields, stages in cases:
        config = load_config(workshop.run_file("run", sections | fields))
        for memory in (80 * GB, 2_000_000_000):
            facts = fit_facts(config, Device(2, memory))
            assert {each["zero_stage"] for each in facts["table"]} == stages, fields
            if facts["choice"]:
                load_config(workshop.run_file("run", sections | fields), facts["choice"]["overrides"])
        assert all(
            each.zero_stage in stages
            for each in settings_that_fit(config, read_model_mapping(config.model), Device(2, 80 * GB))
        )


def test_numbers_of_gpus_that_a_run_cannot_have_are_refused(workshop: Workshop) -> None:
    workshop.stores()
    file = workshop.run_file("run", {"deepspeed.sequence_parallel": 2, "train.micro_batch_size": 1})
    for gpus, field in ((3, "deepspeed.sequence_parallel"), (62, "train.global_batch_tokens")):
        with pytest.raises(ConfigError, match=field):
            fit_facts(load_config(file), Device(gpus, 80 * GB))


def test_fp32_on_a_gpu_has_no_attention_kernel_without_a_mask(workshop: Workshop) -> None:
    workshop.stores()
    for precision, wanted in (("fp32", "mask"), ("bf16", "fused")):
        config = load_config(workshop.run_file("run", {"train.precision": precision}))
        assert setting_of(config, read_model_mapping(config.model), world_size=1, on_gpu=True).attention == wanted


@pytest.mark.parametrize(
    "sizes", [{"num_attention_heads": "many"}, {"num_attention_heads": 0}, {"vocab_size": 1.5}, {"hidden_size": -8}]
)
def test_sizes_that_are_none_are_refused(one_b: RunConfig, sizes: dict[str, Any]) -> None:
    model = {"model_type": "llama", **sizes}
    config = one_b.model_copy(update={"model": one_b.model.model_copy(update={"init_from": None, "fresh": model})})
    with pytest.raises(ConfigError, match="model"):
        fit_facts(config, Device(8, 80 * GB))


def test_bad_questions_are_refused_with_what_to_change(workshop: Workshop, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("{model_type: mamba}")
    for arguments, word in (
        (("--gpus", 8), "one of the two"),
        (("--model", other), "mamba"),
        (("--model", ONE_B, "--gpu-memory", "much"), "is no size"),
        (("--model", tmp_path / "none.yaml"), "model.init_from"),
    ):
        done = workshop.cpt("plan", "fit-memory", *arguments)
        assert done.code == 2 and word in done.err, done.text
    assert workshop.cpt("plan", "fit-memory", "--model", ONE_B, "--gpu-memory", "1GB").code == 2
