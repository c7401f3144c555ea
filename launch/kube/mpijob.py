"""The other form of a run in Kubernetes: an MPIJob (kubeflow.org/v2beta1), where the MPI operator is installed.

mpirun starts one ``launch.local.node`` on each worker over ssh; the rest is as in ``launch.kube.manifests``. The image
must hold mpirun (Open MPI), sshd, and a name for the user in /etc/passwd. Weaker than the Indexed Job: the operator
knows no pod failure policy, and a worker's sshd ends at once when its pod is deleted, whatever its ranks are saving.
"""

from launch.cluster import KubernetesCluster
from launch.kube.manifests import (
    FILES,
    RUN_FILE,
    Content,
    config_map,
    head,
    network_policy,
    node_command,
    pod_template,
    variables,
)
from launch.kube.text import Manifest, object_name

KEYS = "/etc/cpt-ssh"  # where the operator mounts the keys it makes
SSHD_FILE, SSH_PORT = "sshd_config", 2222  # a port that needs no root
SSHD = f"""Port {SSH_PORT}
HostKey {KEYS}/id_rsa
AuthorizedKeysFile {KEYS}/authorized_keys
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
"""
SSH_ARGUMENTS = (
    f"-p {SSH_PORT} -i {KEYS}/id_rsa -o ConnectionAttempts=60 "
    "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
)


def mpi_manifests(cluster: KubernetesCluster, content: Content) -> list[Manifest]:
    """Config map, network policy and MPIJob of a run."""
    name = object_name(content.name)
    place = {"MASTER_ADDR": f"{name}-worker-0.{name}", "MASTER_PORT": str(cluster.master_port)}
    environment = variables(cluster, content.shell, place)
    sshd = ["/usr/sbin/sshd", "-De", "-f", f"{FILES}/{SSHD_FILE}"]
    names = ["PATH", *(each["name"] for each in environment)]  # sshd hands its own environment to nobody
    starter = ["--bind-to", "none", "-n", str(cluster.nodes), *(word for each in names for word in ("-x", each))]
    settings = {"plm_rsh_args": SSH_ARGUMENTS, "odls_base_sigkill_timeout": str(cluster.grace_seconds)}
    mpirun = ["mpirun", *(word for pair in settings.items() for word in ("--mca", *pair)), *starter]
    launcher = pod_template(cluster, name, command=[*mpirun, *node_command(cluster, content)], variables=environment)
    # It computes nothing itself.
    few = {"cpu": "500m", "memory": "1Gi", "ephemeral-storage": cluster.scratch}
    launcher["spec"]["containers"][0]["resources"] = {"requests": few, "limits": {"memory": "1Gi"}}
    worker = pod_template(cluster, name, command=sshd, variables=environment)
    spec = {
        "slotsPerWorker": 1,  # one starter of ranks
        "sshAuthMountPath": KEYS,
        "mpiImplementation": "OpenMPI",
        "runPolicy": {"suspend": False, "cleanPodPolicy": "Running", "backoffLimit": cluster.restarts},
        "mpiReplicaSpecs": {
            "Launcher": {"replicas": 1, "restartPolicy": "Never", "template": launcher},
            "Worker": {"replicas": cluster.nodes, "restartPolicy": "Never", "template": worker},
        },
    }
    files = config_map(cluster, name, {RUN_FILE: content.run_file, SSHD_FILE: SSHD})
    return [
        files,
        network_policy(cluster, name),
        {**head("kubeflow.org/v2beta1", "MPIJob", cluster, name), "spec": spec},
    ]
