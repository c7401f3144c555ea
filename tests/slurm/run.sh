#!/bin/sh
# Install what is missing, run the tests of this folder with the given pytest and its arguments, remove it again.
#     tests/slurm/run.sh .venv/bin/python -m pytest
set -eu
absent=
for package in munge slurm-client slurmctld slurmd iproute2; do
    dpkg -s "$package" >/dev/null 2>&1 || absent="$absent $package"
done
masked=
remove() {
    [ -z "$absent" ] || apt-get -o DPkg::Lock::Timeout=300 purge --yes --auto-remove $absent >/dev/null
    [ -z "$masked" ] || systemctl --quiet --runtime unmask munge.service slurmctld.service slurmd.service
}
if [ -n "$absent" ]; then
    # The packages would start daemons of their own; the tests start theirs, in a folder of theirs.
    if [ -d /run/systemd/system ]; then
        masked=yes
        systemctl --quiet --runtime mask munge.service slurmctld.service slurmd.service
    fi
    trap remove EXIT
    apt-get -qq update
    apt-get -o DPkg::Lock::Timeout=300 install --yes --no-install-recommends $absent >/dev/null
fi
CPT_TEST_SLURM=1 "$@" "$(dirname "$0")"
