#!/usr/bin/env bash
# Hosts of network namespaces on a bridge, each with its own processes, name, /tmp, /dev/shm, home and sshd. Run by tests/e2e/hosts.py:
#
#   unshare --net --mount --pid --fork --mount-proc --kill-child bash hosts.sh FOLDER COUNT KEPT...
#
# FOLDER is seen by all of them (a shared file system), as are the KEPT folders where they lie below /tmp. FOLDER/host-N is the home
# of host N, FOLDER/sshd_config its daemon's file; FOLDER/host-N.up appears when it listens. It ends with its own process.
set -euo pipefail

private_tmp() {  # NAME: a /tmp of its own, in which the shared folders still are
  mkdir -p "$folder/$1.tmp"
  mount -t tmpfs tmpfs "$folder/$1.tmp"
  for kept in "$folder" "${keep[@]}"; do
    case $kept in /tmp/*) mkdir -p "$folder/$1.tmp/${kept#/tmp/}"; mount --bind "$kept" "$folder/$1.tmp/${kept#/tmp/}" ;; esac
  done
  mount --rbind "$folder/$1.tmp" /tmp
}

if [ "$1" = --host ]; then
  folder=$2 number=$3; shift 3; keep=("$@")
  touch "$folder/host-$number.apart"
  hostname "host-$number"
  until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
  ip link set lo up
  ip addr add "10.77.0.1$number/24" dev eth0
  ip link set eth0 up
  mount -t tmpfs tmpfs /dev/shm
  mount --bind "$folder/host-$number.passwd" /etc/passwd
  mount --bind "$folder/host-$number.hosts" /etc/hosts
  private_tmp "host-$number"
  touch "$folder/host-$number.up"
  exec /usr/sbin/sshd -D -e -f "$folder/sshd_config" 2> "$folder/host-$number.log"
fi

folder=$1 count=$2; shift 2; keep=("$@")
mount --make-rprivate /
mount -t tmpfs tmpfs /run      # sshd's own folder is there
mkdir /run/sshd
ip link set lo up
ip link add br0 type bridge
ip addr add 10.77.0.1/24 dev br0
ip link set br0 up
for number in $(seq "$count"); do
  unshare --pid --fork --mount --mount-proc --net --ipc --uts --kill-child bash "$0" --host "$folder" "$number" "${keep[@]}" &
  host=$!
  until [ -e "$folder/host-$number.apart" ]; do sleep 0.05; done
  ip link add "veth$number" type veth peer name eth0 netns $host
  ip link set "veth$number" master br0 up
done
private_tmp operator
wait
