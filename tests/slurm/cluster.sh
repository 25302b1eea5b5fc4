#!/usr/bin/env bash
# A real SLURM of two nodes on one machine, from Debian's packages, as root, beside whatever else runs there:
#
#   cluster.sh start FOLDER     its own configuration, ports, munge; prints the variables to export
#   cluster.sh large FOLDER     a controller alone that knows 1,024 nodes with 8 GPUs each: for sbatch --test-only
#   cluster.sh kill FOLDER N    slurmd of node N gets SIGKILL: the node is lost
#   cluster.sh revive FOLDER N  it comes back
#   cluster.sh stop FOLDER      nothing is left
#
# With FARSPAN_TEST_INSTALL=1 it installs slurm-wlm and munge where apt-get can; exit code 3 where SLURM cannot be had here.
set -euo pipefail

command=${1:-} base=${2:-} node=${3:-}
[[ $command =~ ^(start|large|kill|revive|stop)$ && $base == /* ]] || {
  echo "usage: $0 start|large|kill|revive|stop FOLDER [NODE], FOLDER an absolute path" >&2
  exit 2
}
export SLURM_CONF=$base/slurm.conf
names=(farspan-n1 farspan-n2)
mark="# $base"  # of what is added to /etc/hosts

unavailable() { echo "SLURM cannot be had here: $*" >&2; exit 3; }

free_port() { # below those that connections take for themselves
  local port
  while :; do
    port=$((20000 + RANDOM % 12000))
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || { echo "$port"; return; }
  done
}

daemon() { # whoever waits for the end of this script's output does not wait for its
  "$@" </dev/null >>"$base/log/started" 2>&1
}

prepare() {
  [[ $(id -u) == 0 ]] || unavailable "it needs root"
  if ! command -v slurmctld slurmd munged sbatch >/dev/null; then
    [[ -n ${FARSPAN_TEST_INSTALL:-} ]] || unavailable "slurm-wlm and munge are not installed (tests/slurm/run.sh does it)"
    command -v apt-get >/dev/null || unavailable "no slurmctld, slurmd or munged, and no apt-get"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge; } >/dev/null 2>&1 ||
      unavailable "apt-get cannot install slurm-wlm and munge"
  fi
  host=$(hostname -s)
  mkdir -p "$base"/{state,spool,log,munge}
  # Nodes have names of their own, which must have addresses.  /etc/hosts may be a mount: it is written, not replaced.
  local line="127.0.0.1 ${names[*]} $mark"
  grep -qF "$line" /etc/hosts || echo "$line" >>/etc/hosts
  getent hosts "$host" >/dev/null || echo "127.0.0.1 $host $mark" >>/etc/hosts

  head -c 128 /dev/urandom >"$base/munge/key"
  chmod 600 "$base/munge/key"
  chmod 755 "$base" "$base/munge"
  daemon munged --force --key-file="$base/munge/key" --socket="$base/munge/socket" --pid-file="$base/munge/pid" \
    --log-file="$base/munge/log" --seed-file="$base/munge/seed"

  : >"$base/cgroup.conf"
  cat >"$SLURM_CONF" <<CONF
ClusterName=farspan
SlurmctldHost=$host
SlurmctldPort=$(free_port)
SlurmUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits
AuthInfo=socket=$base/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$base/state
SlurmdSpoolDir=$base/spool/%n
SlurmctldPidFile=$base/slurmctld.pid
SlurmdPidFile=$base/%n.pid
SlurmctldLogFile=$base/log/slurmctld
SlurmdLogFile=$base/log/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
JobRequeue=1
KillWait=10
SlurmdTimeout=20
ReturnToService=2
TCPTimeout=5
CONF
}

controller() {
  daemon slurmctld -f "$SLURM_CONF"
  for _ in $(seq 100); do
    scontrol ping >/dev/null 2>&1 && return
    sleep 0.2
  done
  tail -n 20 "$base"/log/* >&2
  stop
  unavailable "the controller did not come up"
}

start() {
  prepare
  cat >>"$SLURM_CONF" <<CONF
NodeName=${names[0]} NodeHostname=$host NodeAddr=127.0.0.1 Port=$(free_port) CPUs=$(nproc --all) RealMemory=1024
NodeName=${names[1]} NodeHostname=$host NodeAddr=127.0.0.1 Port=$(free_port) CPUs=$(nproc --all) RealMemory=1024
PartitionName=main Nodes=$(IFS=,; echo "${names[*]}") Default=YES MaxTime=INFINITE State=UP
CONF
  controller
  for name in "${names[@]}"; do daemon slurmd -f "$SLURM_CONF" -N "$name"; done
  for _ in $(seq 60); do
    [[ $(sinfo -h -t idle -o %D 2>/dev/null) == "${#names[@]}" ]] && { echo "SLURM_CONF=$SLURM_CONF"; return; }
    sleep 0.5
  done
  tail -n 20 "$base"/log/* >&2
  stop
  unavailable "the nodes did not come up"
}

large() {
  prepare
  cat >>"$SLURM_CONF" <<CONF
GresTypes=gpu
# Nodes that could be powered up: the only ones that it plans with though they have never answered.
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=3600
NodeName=large[1-1024] State=CLOUD Sockets=2 CoresPerSocket=64 RealMemory=1000000 Gres=gpu:8
PartitionName=main Nodes=large[1-1024] Default=YES MaxTime=INFINITE State=UP
CONF
  controller
  echo "SLURM_CONF=$SLURM_CONF"
}

end() { # of a daemon, by its own file
  local pid
  pid=$(cat "$1" 2>/dev/null) || return 0
  kill "-$2" "$pid" 2>/dev/null || return 0
  for _ in $(seq 100); do
    kill -0 "$pid" 2>/dev/null || return 0
    sleep 0.1
  done
  kill -KILL "$pid" 2>/dev/null || true
}

stop() {
  if [[ -f $base/slurmctld.pid ]]; then
    scancel --state=RUNNING --state=PENDING --state=SUSPENDED --user=root 2>/dev/null || true
    for _ in $(seq 60); do # jobs end before those who could end them
      [[ -z $(squeue -h 2>/dev/null) ]] && break
      sleep 0.5
    done
  fi
  for name in "${names[@]}"; do end "$base/$name.pid" TERM; done
  end "$base/slurmctld.pid" TERM
  end "$base/munge/pid" TERM
  # What steps of a lost node left: everything that was started here has this configuration in its environment.
  for process in /proc/[0-9]*; do
    if [[ ${process#/proc/} != "$$" ]] && tr '\0' '\n' 2>/dev/null <"$process/environ" | grep -qx "SLURM_CONF=$SLURM_CONF" &&
      tr '\0' '\n' 2>/dev/null <"$process/environ" | grep -q '^SLURM_JOB_ID='; then
      kill -KILL "${process#/proc/}" 2>/dev/null || true
    fi
  done
  if grep -qF "$mark" /etc/hosts; then
    local kept
    kept=$(grep -vF "$mark" /etc/hosts)
    printf '%s\n' "$kept" >/etc/hosts
  fi
}

case $command in
start) start ;;
large) large ;;
kill) end "$base/${names[node - 1]}.pid" KILL ;;
revive) daemon slurmd -f "$SLURM_CONF" -N "${names[node - 1]}" ;;
stop) stop ;;
esac
