"""`cpt ckpt`: what lies in checkpoints, whether it is whole, and what becomes of it in other programs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpt.checkpoint.portable import Checkpoint

Workshop = Any  # the fixtures of tests/conftest.py
FIELDS = {"train.tokens": 6 * 256, "checkpoint.every_steps": 2, "checkpoint.keep_last": 2, "eval.every_steps": 2}
KEPT = {"checkpoint.keep_weights_every": 2, "checkpoint.keep_best": "code"}


@pytest.fixture(scope="session")
def done_once(made_once: Callable[..., Workshop]) -> Workshop:
    """The run ``whole``: weights of step 2, full checkpoints of steps 4 and 6; and ``hf``, its end exported."""

    def make(shop: Workshop) -> None:
        shop.stores()
        done = shop.cpt("train", shop.run_file("whole", FIELDS | KEPT))
        assert done.code == 0, done.text
        end = shop.run_dir("whole") / "checkpoints" / "step_00000006"
        done = shop.cpt("ckpt", "convert", end, "--to", "hf", "--out", shop.root / "hf", "--json")
        assert done.code == 0 and "largest logit difference" in json.loads(done.out)["proof"], done.text

    return made_once("ckpt_cli", make)


@pytest.fixture
def shop(done_once: Workshop, tmp_path: Path) -> Workshop:
    shutil.copytree(done_once.root, tmp_path / "shop")
    return type(done_once)(tmp_path / "shop")


def checkpoint(shop: Workshop, step: int) -> Path:
    return Path(shop.run_dir("whole") / "checkpoints" / f"step_{step:08d}")


def test_a_run_folder_shows_all_its_checkpoints_and_why_they_are_kept(shop: Workshop) -> None:
    done = shop.cpt("ckpt", "inspect", shop.run_dir("whole"), "--json")
    assert done.code == 0, done.text
    ((facts,),) = [json.loads(done.out)]
    found = {each["step"]: each for each in facts["checkpoints"]}
    assert [(step, each["kind"]) for step, each in found.items()] == [(2, "weights"), (4, "full"), (6, "full")]
    assert found[2]["state_kinds"] == [] and found[6]["state_kinds"] == ["exp_avg", "exp_avg_sq"]
    assert found[4]["tokens_seen"] == 1024 and sum(found[4]["tokens_by_source"].values()) == 1024
    assert found[6]["written_by"]["world_size"] == 1 and found[6]["written_by"]["zero_stage"] == 0
    assert found[4]["losses"] == {
        name: source["loss"] for name, source in shop.evaluation("whole", 4)["sources"].items()
    }
    assert found[6]["kept_because"][0] == "newest" and found[4]["kept_because"] == ["one of the last 2"]
    assert found[2]["kept_because"] == ["weights of every 2 steps"]
    assert "lowest loss of code" in found[6]["kept_because"]
    shown = shop.cpt("ckpt", "inspect", shop.run_dir("whole"))
    assert shown.code == 0 and "weights" in shown.out and "newest" in shown.out


def test_parameters_are_listed_with_shapes_and_norms(shop: Workshop) -> None:
    done = shop.cpt("ckpt", "inspect", checkpoint(shop, 6), "--params", "--json")
    assert done.code == 0, done.text
    (facts,) = json.loads(done.out)[0]["checkpoints"]
    params = facts["params"]
    assert params["model.embed_tokens.weight"]["shape"] == [64, 32]
    assert set(params["model.norm.weight"]["norms"]) == {"param", "exp_avg", "exp_avg_sq"}
    assert params["model.norm.weight"]["norms"]["param"] == pytest.approx(32**0.5, rel=0.1)
    shown = shop.cpt("ckpt", "inspect", checkpoint(shop, 2), "--params")
    assert shown.code == 0 and "model.norm.weight" in shown.out and "64 x 32" in shown.out


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_a_checkpoint_that_a_live_run_gives_up_meanwhile_is_no_damage(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    real, opened = Checkpoint.open, []

    def retention_is_faster(path: Path) -> Checkpoint:
        opened.append(path.name)
        if opened.count("step_00000004") == (1 if verb == "inspect" else 2):
            shutil.rmtree(checkpoint(shop, 4), ignore_errors=True)
        return real(path)

    monkeypatch.setattr(Checkpoint, "open", retention_is_faster)
    done = shop.cpt("ckpt", verb, shop.run_dir("whole"), "--json")
    assert done.code == 0 and "step_00000004" in opened, done.text
    found = json.loads(done.out)[0]["checkpoints"]
    assert [Path(each["path"]).name for each in found] == ["step_00000002", "step_00000006"]


def test_a_broken_checkpoint_is_shown_with_the_reason_and_the_others_too(shop: Workshop) -> None:
    (checkpoint(shop, 4) / "COMPLETE").unlink()
    done = shop.cpt("ckpt", "inspect", shop.run_dir("whole"), "--json")
    found = {each["step"]: each for each in json.loads(done.out)[0]["checkpoints"]}
    assert found[4]["kind"] == "broken" and "its save was cut short" in found[4]["problem"]
    assert found[6]["kind"] == "full"
    assert "broken: " in shop.cpt("ckpt", "inspect", shop.run_dir("whole")).out


def test_whole_checkpoints_are_good(shop: Workshop) -> None:
    done = shop.cpt("ckpt", "verify", shop.run_dir("whole"))
    assert done.code == 0 and done.out.count(": good") == 3, done.text


def test_a_flipped_byte_is_named_and_the_exit_code_is_2(shop: Workshop) -> None:
    shard = next(checkpoint(shop, 6).glob("*.state.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    done = shop.cpt("ckpt", "verify", shop.run_dir("whole"), "--json")
    assert done.code == 2, done.text
    facts = json.loads(done.out)[0]
    assert not facts["good"] and [bool(each["problems"]) for each in facts["checkpoints"]] == [False, False, True]
    assert shard.name in facts["checkpoints"][2]["problems"][0]


def test_values_that_are_no_numbers_are_found_behind_good_hashes(shop: Workshop, tmp_path: Path) -> None:
    from cpt.checkpoint.portable import Checkpoint, Fragment
    from cpt.checkpoint.writing import finish_checkpoint, write_shard

    good = Checkpoint.open(checkpoint(shop, 2))
    fragments = [Fragment(name, 0, {"param": tensor.reshape(-1)}) for name, tensor in good.tensors()]
    fragments[1].state["param"][3:5] = float("nan")
    out = tmp_path / "step_00000001"
    out.mkdir()
    finish_checkpoint(out, good.meta, [write_shard(out, fragments, rank=0, world_size=1, parts=("param",))])
    done = shop.cpt("ckpt", "verify", out)
    assert done.code == 2 and f"2 elements of param {fragments[1].name} are not finite numbers" in " ".join(
        done.out.split()
    )


def test_hugging_face_and_back_gives_the_same_weights_and_a_run_starts_from_them(shop: Workshop) -> None:
    import torch

    from cpt.checkpoint.portable import Checkpoint

    out = shop.root / "back"
    done = shop.cpt("ckpt", "convert", shop.root / "hf", "--to", "cpt", "--out", out)
    assert done.code == 0 and "holds weights" in done.out, done.text
    there, back = Checkpoint.open(checkpoint(shop, 6)), Checkpoint.open(out)
    assert not back.is_full and list(back.meta.parameter_shapes) == list(there.meta.parameter_shapes)
    assert all(torch.equal(tensor, there.read(name)) for name, tensor in back.tensors())
    file = shop.run_file("on", {"train.tokens": 512, "model.fresh": None, "model.init_from": str(out)})
    assert shop.cpt("train", file).code == 0
    assert shop.evaluation("on", 0)["sources"]["code"]["loss"] == pytest.approx(
        shop.evaluation("whole", 6)["sources"]["code"]["loss"], rel=1e-5
    )


def test_what_cannot_be_converted_is_refused_and_leaves_nothing(shop: Workshop) -> None:
    taken, new = shop.root / "taken", shop.root / "new"
    taken.mkdir()
    (taken / "file").touch()
    before = sorted(path.name for path in shop.root.iterdir())
    end = checkpoint(shop, 6)
    for source, to, out, reason in (
        (end, "hf", taken, "holds something already"),
        (end, "cpt", new, "is a checkpoint of cpt; from cpt: --to hf or deepspeed"),
        (shop.root / "hf", "deepspeed", new, "is a checkpoint of Hugging Face"),
        (checkpoint(shop, 2), "deepspeed", new, "holds weights alone"),
        (shop.root / "prose", "cpt", new, "is neither a checkpoint of cpt"),
        (shop.root / "nowhere", "cpt", new, "is neither a checkpoint of cpt"),
    ):
        done = shop.cpt("ckpt", "convert", source, "--to", to, "--out", out)
        assert done.code == 2 and reason in " ".join(done.err.split()), done.text
    assert sorted(path.name for path in shop.root.iterdir()) == before
    assert shop.cpt("ckpt", "inspect", shop.root / "prose").code == 2


def test_to_deepspeed_and_back_keeps_every_element(shop: Workshop) -> None:
    import torch

    from cpt.checkpoint.portable import Checkpoint

    universal, back = shop.root / "universal", shop.root / "back"
    assert shop.cpt("ckpt", "convert", checkpoint(shop, 6), "--to", "deepspeed", "--out", universal).code == 0
    done = shop.cpt("ckpt", "convert", universal, "--to", "cpt", "--out", back, "--model", shop.root / "hf")
    assert done.code == 0, done.text
    there, again = Checkpoint.open(checkpoint(shop, 6)), Checkpoint.open(back)
    assert again.meta.optimizer_steps == there.meta.optimizer_steps == 6
    for name, kinds in there.kinds.items():
        assert all(torch.equal(there.read(name, kind), again.read(name, kind)) for kind in kinds)
    config = json.loads((shop.root / "hf/config.json").read_text())
    (shop.root / "small").mkdir()
    (shop.root / "small/config.json").write_text(json.dumps({**config, "hidden_size": 16}))
    done = shop.cpt(
        "ckpt", "convert", universal, "--to", "cpt", "--out", shop.root / "x", "--model", shop.root / "small"
    )
    assert done.code == 2 and "describes another model" in done.err
    done = shop.cpt("ckpt", "convert", universal, "--to", "cpt", "--out", shop.root / "x")
    assert done.code == 2 and "--model" in done.err and "do not describe the model" in done.err
