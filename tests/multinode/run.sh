#!/bin/sh
# Install what is missing, run the tests of this folder with the given pytest and its arguments, remove it again.
#     tests/multinode/run.sh .venv/bin/python -m pytest -m "not long"
set -eu
absent=
for package in iproute2 openssh-server pdsh; do
    dpkg -s "$package" >/dev/null 2>&1 || absent="$absent $package"
done
remove() {
    [ -z "$absent" ] || apt-get -o DPkg::Lock::Timeout=300 purge --yes --auto-remove $absent >/dev/null
    [ -z "$masked" ] || systemctl --quiet --runtime unmask ssh.service ssh.socket
}
masked=
if [ -n "$absent" ]; then
    # The package would start a daemon that listens to the world; the tests start their own, inside the namespaces.
    if [ -d /run/systemd/system ]; then masked=yes; systemctl --quiet --runtime mask ssh.service ssh.socket; fi
    trap remove EXIT
    apt-get -qq update
    apt-get -o DPkg::Lock::Timeout=300 install --yes --no-install-recommends $absent >/dev/null
fi
CPT_TEST_MULTINODE=1 "$@" "$(dirname "$0")"
