"""The cluster file: every problem at once, and nothing that would start something else than what it says."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt.problems import ConfigError
from launch.cluster import HostsCluster, KubernetesCluster, SlurmCluster, exported, hosts_of, load_cluster


def write(folder: Path, **fields: Any) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def problems(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_cluster(path)
    return [problem.field for problem in caught.value.problems]


def test_a_hostfile_lies_beside_the_cluster_file_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "clusters"
    folder.mkdir()
    (folder / "hosts").write_text("a slots=2\nb slots=2\n")
    monkeypatch.chdir(tmp_path)
    cluster = load_cluster(write(folder, hostfile="hosts").relative_to(tmp_path))
    assert isinstance(cluster, HostsCluster) and cluster.hostfile == folder / "hosts"
    assert [host.name for host in hosts_of(cluster)] == ["a", "b"]


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        hostfile="nothere",
        master_prt=1,
        interface="eth0; rm",
        ssh_options=["-o Key=value"],
        master_address="$(x)",
        export=["HF_TOKEN", "NCCL_*", "A B"],
        env={"NCCL_*": "1"},
    )
    found = problems(path)
    assert {"hostfile", "master_prt", "interface", "ssh_options.0", "master_address", "export.0", "export.2"} <= {
        *found
    }
    assert any(field.startswith("env") for field in found)


def test_the_nearest_field_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"master_prt = 1: unknown field; did you mean master_port\?"):
        load_cluster(write(tmp_path, hosts=["a slots=1"], master_prt=1))


@pytest.mark.parametrize("fields", [{}, {"hosts": []}, {"hosts": ["a slots=1"], "hostfile": "cluster.yaml"}])
def test_hosts_are_stated_once(tmp_path: Path, fields: dict[str, Any]) -> None:
    assert problems(write(tmp_path, **fields)) == ["hostfile"]


@pytest.mark.parametrize(
    "fields", [{"hosts": "a"}, {"hosts": [1]}, {"hostfile": 3}, {"kind": ["hosts"]}, {"kind": "x"}]
)
def test_a_field_of_another_type_is_a_problem_and_no_traceback(tmp_path: Path, fields: dict[str, Any]) -> None:
    assert problems(write(tmp_path, **fields))


def test_the_kind_decides_the_fields(tmp_path: Path) -> None:
    slurm = load_cluster(write(tmp_path, kind="slurm", nodes=2, time_limit="1:00:00"))
    kube = load_cluster(write(tmp_path, kind="kubernetes", nodes=2, image="cpt:1"))
    assert isinstance(slurm, SlurmCluster) and isinstance(kube, KubernetesCluster)
    assert "ssh_port" in problems(write(tmp_path, kind="slurm", nodes=2, time_limit="1:00:00", ssh_port=22))


def test_of_this_shell_only_what_is_allowed_is_handed_on_and_never_a_secret(tmp_path: Path) -> None:
    cluster = load_cluster(write(tmp_path, hosts=["a slots=1"], export=["NCCL_*", "HF_HOME"]))
    shell = {
        "NCCL_DEBUG": "INFO",
        "HF_HOME": "/hf",
        "HF_TOKEN": "x",
        "PATH": "/bin",
        "NCCL_API_KEY": "x",
        "NCCL_,HOME": "x",
    }
    assert exported(cluster, shell) == {"NCCL_DEBUG": "INFO", "HF_HOME": "/hf"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must hold a mapping of fields such as kind, hosts"),
        ("[a]", "must hold a mapping of fields such as kind, hosts"),
        ("hostfile: ~no-such-user/hosts", "no such file"),
        ("{hosts: [a slots=1], env: {N: 1}}", "env.N = 1: input should be a valid string; put it in quotes"),
        ("{kind: kubernetes, image: x, nodes: 1, cpu: 4}", "put it in quotes; CPU request"),
    ],
)
def test_a_common_mistake_is_told_with_its_fix(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_cluster(path)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    "name",
    [
        *("DB_PASSWD", "SSH_PASSPHRASE", "WANDB_API_KEY", "HF_TOKEN", "AZURE_STORAGE_KEY", "DB_PASS", "GITHUB_PAT"),
        *("AZURE_STORAGE_CONNECTION_STRING", "NPM_CONFIG__AUTH", "SENTRY_DSN"),
    ],
)
def test_a_wildcard_hands_no_secret_on(name: str, tmp_path: Path) -> None:
    cluster = load_cluster(write(tmp_path, hosts=["a slots=1"], export=[f"{name[:2]}*"]))
    assert exported(cluster, {name: "x", f"{name[:2]}_HOME": "/y"}) == {f"{name[:2]}_HOME": "/y"}


def test_a_switch_of_a_tokenizer_is_no_secret(tmp_path: Path) -> None:
    cluster = load_cluster(write(tmp_path, hosts=["a slots=1"], env={"TOKENIZERS_PARALLELISM": "false"}))
    assert cluster.env == {"TOKENIZERS_PARALLELISM": "false"}
