#!/bin/bash
# cluster.sh - a real multi-node Slurm cluster on one machine, without systemd, for tests.
#
#   cluster.sh start|stop|restart|status      idempotent; stop removes everything it made
#   cluster.sh exec CMD...                    run CMD as if on the login node (sbatch, pytest, ...)
#   cluster.sh on NODE CMD...                run CMD on a "compute node" (netns mode)
#   cluster.sh crash NODE                    power-cut: SIGKILL every process of that node
#   cluster.sh cut|join NODE                 pull / plug its network cable (netns mode)
#   cluster.sh boot NODE                     start its slurmd again and wait until idle
#   cluster.sh env                            print "export ..." lines (loopback mode: enough to use sbatch)
#
# Settings (environment):
#   CLUSTER_DIR   (/tmp/megatron_scratch_cluster)  everything lives here: conf, munge key, spool, logs, state
#   CLUSTER_NODES (2)  CLUSTER_GPUS (8)  CLUSTER_CPUS (16)  CLUSTER_MEM (8000, MiB)
#   CLUSTER_MODE  (auto|netns|loopback)  netns: each node is a network+uts namespace with its own
#                hostname and address, real TCP in between, needs CAP_SYS_ADMIN+CAP_NET_ADMIN;
#                loopback: all slurmd on 127.0.0.1 with a port each, needs no privilege
#   CLUSTER_PROCTRACK (auto|cgroup|linuxproc|pgid)
#   CLUSTER_EXTRA        extra slurm.conf lines
#   CLUSTER_HIDE=DIR     with boot (netns mode): a node from which this folder is missing
# Needs: apt-get install -y --no-install-recommends slurm-wlm munge iproute2
set -euo pipefail; [ -z "${CLUSTER_TRACE:-}" ] || { PS4="+\t\$(date +%s.%N) "; set -x; }
D=${CLUSTER_DIR:-/tmp/megatron_scratch_cluster}
[ -f "$D/settings" ] && . "$D/settings"        # a running cluster keeps the settings it was started with
N=${CLUSTER_NODES:-2} G=${CLUSTER_GPUS:-8} C=${CLUSTER_CPUS:-16} M=${CLUSTER_MEM:-8000}
MODE=${CLUSTER_MODE:-auto} PT=${CLUSTER_PROCTRACK:-auto}
HOSTS=${CLUSTER_HOSTS:-}
TAG=${CLUSTER_TAG:-node}                         # the nodes are TAG1, TAG2, ...; namespaces and cgroups are named after them
NET=10.77.0
export SLURM_CONF=$D/etc/slurm.conf PATH=$PATH:/usr/sbin:/sbin
export MUNGE_SOCKET=$D/munge/sock

say()  { echo "slurm-cluster: $*" >&2; }
die()  { say "$*"; exit 1; }
wait_for() { # wait_for SECONDS CMD... : poll every 50 ms
  local end=$(( $(date +%s%N) + $1 * 1000000000 )); shift
  until "$@" >/dev/null 2>&1; do [ "$(date +%s%N)" -lt "$end" ] || return 1; sleep 0.05; done
}
nodes() { seq -f "$TAG%g" 1 "$N"; }
alive() { [ -s "$1" ] && live "$(cat "$1")"; }
live() { grep -q '^State:[[:space:]]*[^ZX]' /proc/$1/status 2>/dev/null; }     # a zombie is not alive
# enter NAME CMD...: network namespace + its own hostname and /etc/hosts. Not 'ip netns exec': that one mounts a
# fresh /sys without the cgroup hierarchies, and proctrack/cgroup then fails with "'freezer' not mounted".
enter() {
  local n=$1; shift
  if [ "$MODE" != netns ]; then     # only /etc/hosts, so that the nodes resolve (to 127.0.0.1), where mounting is allowed
    if [ "$HOSTS" = mount ]; then unshare -m sh -c 'mount --bind "$1" /etc/hosts && shift && exec "$@"' sh "$D/etc/hosts" "$@"; else "$@"; fi
    return
  fi
  nsenter --net=/run/netns/$TAG-$n unshare -m -u sh -c \
    'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"' sh "$D/etc/hosts" $n "$@"
}
in_ctl() { enter ctl "$@"; }

can_netns() {
  [ "$(id -u)" = 0 ] && command -v ip >/dev/null && ip netns add $TAG-probe 2>/dev/null || return 1
  local ok=1; ip -n $TAG-probe link add v0 type veth peer name v1 2>/dev/null || ok=0
  unshare -u true 2>/dev/null || ok=0
  ip netns del $TAG-probe; [ $ok = 1 ]
}
can_cgroup1() { # is a v1 freezer hierarchy there and writable?
  [ "$(id -u)" = 0 ] && mkdir /sys/fs/cgroup/freezer/$TAG-probe 2>/dev/null || return 1
  local ok=1; [ -f /sys/fs/cgroup/freezer/$TAG-probe/freezer.state ] || ok=0
  rmdir /sys/fs/cgroup/freezer/$TAG-probe; [ $ok = 1 ]
}

write_conf() {
  local i addr port user; user=$(id -un)
  mkdir -p "$D"/{etc,ctl,spool,log,run,dev,munge}; chmod 755 "$D"; chmod 711 "$D/munge"
  for n in $(nodes); do mkdir -p "$D/spool/$n"; done
  for ((i=0; i<G; i++)); do ln -sfn /dev/null "$D/dev/nvidia$i"; done   # slurmd stat()s them: must be char devices
  cat > "$D/etc/slurm.conf" <<EOF
ClusterName=$TAG
SlurmctldHost=$([ "$MODE" = netns ] && echo "ctl($NET.1)" || echo "$(hostname -s)(127.0.0.1)")
SlurmctldPort=17002
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$D/munge/sock,cred_expire=5
StateSaveLocation=$D/ctl
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/run/slurmctld.pid
SlurmdPidFile=$D/run/%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/%n.log
SlurmctldDebug=info
SlurmdDebug=info
# what a container without systemd needs
ProctrackType=proctrack/$PT
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
MpiDefault=none
SwitchType=switch/none
# nodes larger than the machine
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=64
GresTypes=gpu
# fast turn-around for tests (a real cluster: SlurmdTimeout=300, KillWait=30, requeue hold 120 s)
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,defer_batch
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=5
KillWait=5
UnkillableStepTimeout=60
InactiveLimit=0
MinJobAge=86400
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobCompType=jobcomp/filetxt
JobCompLoc=$D/log/jobcomp.log
AccountingStorageType=accounting_storage/none
${CLUSTER_EXTRA:-}
EOF
  for ((i=1; i<=N; i++)); do
    if [ "$MODE" = netns ]; then addr=$NET.$((10+i)) port=17010; else addr=127.0.0.1 port=$((17020+i)); fi
    echo "NodeName=$TAG$i NodeHostname=$([ "$MODE" = netns ] && echo $TAG$i || echo localhost) NodeAddr=$addr Port=$port CPUs=$C RealMemory=$M Gres=gpu:h100:$G State=UNKNOWN"
  done >> "$D/etc/slurm.conf"
  cat >> "$D/etc/slurm.conf" <<EOF
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=10 PreemptMode=REQUEUE GraceTime=0
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=20 PreemptMode=OFF
EOF
  cat > "$D/etc/gres.conf" <<EOF
AutoDetect=off
NodeName=${TAG}[1-$N] Name=gpu Type=h100 File=$D/dev/nvidia[0-$((G-1))]
EOF
  cat > "$D/etc/cgroup.conf" <<EOF
CgroupPlugin=cgroup/v1
CgroupAutomount=no
CgroupMountpoint=/sys/fs/cgroup
ConstrainCores=no
ConstrainRAMSpace=no
ConstrainDevices=no
EOF
  { cat /etc/hosts; if [ "$MODE" = netns ]; then echo "$NET.1 ctl"; for ((i=1; i<=N; i++)); do echo "$NET.$((10+i)) $TAG$i"; done
    else echo "127.0.0.1 $(nodes | tr '\n' ' ')"; fi; } > "$D/etc/hosts"
}

net_up() { # a bridge inside the ctl namespace; nothing is added to the root namespace
  local i n
  ip netns add $TAG-ctl; ip -n $TAG-ctl link set lo up
  ip -n $TAG-ctl link add br0 type bridge; ip -n $TAG-ctl addr add $NET.1/24 dev br0; ip -n $TAG-ctl link set br0 up
  for ((i=1; i<=N; i++)); do n=$TAG-$TAG$i
    ip netns add $n
    ip -n $TAG-ctl link add p$i type veth peer name eth0 netns $n
    ip -n $TAG-ctl link set p$i master br0 up
    ip -n $n addr add $NET.$((10+i))/24 dev eth0; ip -n $n link set eth0 up; ip -n $n link set lo up
  done
}
net_pids() { ip netns pids "$1" 2>/dev/null || true; }
net_down() {
  local n p
  for n in $(ip netns list 2>/dev/null | awk -v t="^$TAG-(ctl|${TAG}[0-9]+)$" '$1 ~ t {print $1}'); do
    for p in $(net_pids $n); do kill -9 $p 2>/dev/null || true; done
    ip netns del $n
  done
}

node_up() { # with CLUSTER_HIDE=DIR, the node sees nothing in that folder: a mount that is missing
  if [ -z "${CLUSTER_HIDE:-}" ]; then enter $1 slurmd -N $1; return; fi
  enter $1 sh -c 'mount -t tmpfs -o size=64k none "$2" && exec slurmd -N "$1"' sh $1 "$CLUSTER_HIDE"
}
all_idle() { [ "$(in_ctl sinfo -h -N -p gpu -t idle -o %N | wc -l)" = "$N" ]; }

# pids of what runs on a node: the namespace's, or (loopback) slurmd's and its slurmstepds' process trees
node_pids() {
  if [ "$MODE" = netns ]; then net_pids $TAG-$1; return; fi
  [ -s "$D/run/$1.pid" ] && cat "$D/run/$1.pid"
  python3 - "$1" "$SLURM_CONF" <<'EOP'
import glob, os, sys
want = {f"SLURMD_NODENAME={sys.argv[1]}".encode(), f"SLURM_CONF={sys.argv[2]}".encode()}
for d in glob.glob("/proc/[0-9]*"):
    try:
        if want <= set(open(d + "/environ", "rb").read().split(b"\0")): print(os.path.basename(d))
    except OSError: pass
EOP
}

start() {
  if [ -f "$D/settings" ] && alive "$D/run/slurmctld.pid" && all_idle; then say "already running ($MODE, $N nodes)"; return; fi
  [ -f "$D/settings" ] && { say "leftovers found, cleaning"; stop; }
  local c; for c in munged slurmctld slurmd sbatch; do command -v $c >/dev/null || die "no $c: apt-get install -y slurm-wlm munge"; done
  local t0; t0=$(date +%s%N)
  [ "$MODE" = auto ] && { can_netns && MODE=netns || MODE=loopback; }
  if [ "$MODE" = loopback ]; then
    if unshare -m true 2>/dev/null; then HOSTS=mount
    elif getent hosts ${TAG}1 >/dev/null; then HOSTS=have
    elif [ -w /etc/hosts ]; then HOSTS=edit; echo "127.0.0.1 $(nodes | tr '\n' ' ') # cluster.sh" >> /etc/hosts
    else HOSTS=none; say "note: ${TAG}1..$TAG$N do not resolve here; use 127.0.0.1 as MASTER_ADDR"; fi
  fi
  [ "$PT" = auto ] && { can_cgroup1 && PT=cgroup || PT=linuxproc; }
  mkdir -p "$D"; printf 'CLUSTER_NODES=%q CLUSTER_GPUS=%q CLUSTER_CPUS=%q CLUSTER_MEM=%q CLUSTER_MODE=%q CLUSTER_PROCTRACK=%q CLUSTER_TAG=%q CLUSTER_HOSTS=%q\n' \
     "$N" "$G" "$C" "$M" "$MODE" "$PT" "$TAG" "$HOSTS" > "$D/settings"
  [ "$MODE" = netns ] && net_up
  write_conf
  [ -f "$D/munge/key" ] || { (umask 077; dd if=/dev/urandom of="$D/munge/key" bs=128 count=1 status=none); }
  in_ctl munged --force --key-file="$D/munge/key" --socket="$D/munge/sock" --pid-file="$D/run/munged.pid" \
     --log-file="$D/log/munged.log" --seed-file="$D/munge/seed" 2>>"$D/log/munged.err"
  in_ctl slurmctld || die "slurmctld did not start, see $D/log/slurmctld.log"
  for n in $(nodes); do node_up $n || die "slurmd of $n did not start, see $D/log/$n.log"; done
  wait_for 40 all_idle || { in_ctl sinfo -N -l >&2 || true; die "nodes not idle after 40 s, see $D/log"; }
  say "up in $(( ($(date +%s%N)-t0)/1000000 )) ms: $N nodes, $MODE, proctrack/$PT, $(slurmd -V), conf $SLURM_CONF"
}

term() { # SIGTERM all the pid files given, then wait for them together
  local f p ps=""
  for f in "$@"; do alive "$f" && { p=$(cat "$f"); ps="$ps $p"; kill "$p" 2>/dev/null || true; }; done
  [ -z "$ps" ] || wait_for 5 sh -c "for p in $ps; do grep -q '^State:[[:space:]]*[^ZX]' /proc/\$p/status 2>/dev/null && exit 1; done; exit 0" || kill -9 $ps 2>/dev/null || true
}
stop() {
  [ -f "$D/settings" ] || { say "not running"; return 0; }
  local n p
  if alive "$D/run/slurmctld.pid"; then
    in_ctl timeout 5 scancel -u "$(id -un)" 2>/dev/null || true
    wait_for 8 sh -c "[ -z \"\$($0 exec squeue -h 2>/dev/null)\" ]" || true
  fi
  # shellcheck disable=SC2046 # one word a file
  term $(for n in $(nodes); do echo "$D/run/$n.pid"; done) "$D/run/slurmctld.pid"
  for n in $(nodes); do for p in $(node_pids $n); do kill -9 $p 2>/dev/null || true; done; done
  alive "$D/run/munged.pid" && kill -9 "$(cat "$D/run/munged.pid")" || true    # its own clean exit takes seconds
  [ "$MODE" = netns ] && net_down
  for n in $(nodes); do for p in /sys/fs/cgroup/*/slurm_$n; do [ -d "$p" ] && find "$p" -depth -type d -exec rmdir {} + 2>/dev/null; done; done || true
  [ "$HOSTS" = edit ] && { grep -v '# cluster.sh$' /etc/hosts > "$D/hosts.new"; cat "$D/hosts.new" > /etc/hosts; }
  rm -rf "$D"; say stopped
}

case "${1:-}" in
  start) start ;;
  stop) stop ;;
  restart) stop; exec env -u SLURM_CONF "$0" start ;;
  status) [ -f "$D/settings" ] || { say "not running"; exit 3; }; in_ctl sinfo -p gpu -N -o '%N %T %c %m %G'; in_ctl squeue ;;
  exec) shift; [ -f "$D/settings" ] || die "not running"; in_ctl "$@" ;;
  on) n=$2; shift 2; enter $n "$@" ;;
  env) echo "export SLURM_CONF=$SLURM_CONF CLUSTER_DIR=$D" ;;
  crash) for p in $(node_pids $2); do kill -9 $p 2>/dev/null || true; done; rm -f "$D/run/$2.pid" ;;
  cut) ip -n $TAG-ctl link set p${2#$TAG} down ;;
  join) ip -n $TAG-ctl link set p${2#$TAG} up ;;
  boot) alive "$D/run/$2.pid" || node_up $2
        wait_for ${CLUSTER_BOOT:-60} sh -c "$0 exec sinfo -h -n $2 -o %t | grep -qE '^(idle|mix|alloc)\$'" || { in_ctl sinfo -N -l -n $2 >&2; in_ctl sinfo -R >&2; die "$2 does not come up, see $D/log/$2.log"; } ;;
  *) sed -n '2,25p' "$0"; exit 2 ;;
esac
