#!/usr/bin/env bash
# A real Slurm cluster of several nodes on one machine, for the tests: slurmctld, munge, and one slurmd for each node in
# network and host-name namespaces of its own. Needs root with CAP_SYS_ADMIN, and Debian's slurmctld slurmd slurm-client
# munge iproute2. No systemd, no cgroups.
#
#   cluster.sh up [NODES]      3 by default, called n1 n2 ...; partitions batch (the default) and urgent, which preempts it
#   cluster.sh env             prints the line that points sbatch and its like to it: eval "$(tests/slurm/cluster.sh env)"
#   cluster.sh kill NODE       the node crashes: SIGKILL to its slurmd and to all of its jobs' processes
#   cluster.sh start NODE      it comes back
#   cluster.sh down

set -euo pipefail

RUN=${SLURM_TEST_CLUSTER:-${TMPDIR:-/tmp}/dsmoelora-slurm}
NETWORK=10.98.0 # nodes .1 .2 ..., the controller .254
export SLURM_CONF=$RUN/slurm.conf

write_configuration() {
    local nodes=$1 i
    mkdir -p "$RUN"/{state,spool,log,pid,dev}
    for i in 0 1; do [[ -e $RUN/dev/gpu$i ]] || mknod "$RUN/dev/gpu$i" c 1 3; done # GPUs in name alone
    cat >"$SLURM_CONF" <<END
ClusterName=tests
SlurmctldHost=$(hostname -s)($NETWORK.254)
SlurmctldPort=16917
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job has to wait, 120 s by default
AuthInfo=socket=$RUN/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$RUN/state
SlurmdSpoolDir=$RUN/spool/%n
SlurmctldPidFile=$RUN/pid/slurmctld
SlurmdPidFile=$RUN/pid/%n
SlurmctldLogFile=$RUN/log/slurmctld
SlurmdLogFile=$RUN/log/%n
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=10
KillWait=10
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# a preemption begins with the signal that a job asked for, not with SIGTERM
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
GresTypes=gpu
# job numbers, and with them the names of logs, differ from one cluster to the next
FirstJobId=$(($(date +%s) % 1000000))
END
    for ((i = 1; i <= nodes; i++)); do
        echo "NodeName=n$i NodeHostname=n$i NodeAddr=$NETWORK.$i Port=16918 CPUs=4 RealMemory=8000 Gres=gpu:2"
    done >>"$SLURM_CONF"
    cat >>"$SLURM_CONF" <<END
PartitionName=batch Nodes=n[1-$nodes] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=n[1-$nodes] PriorityTier=10 PreemptMode=OFF
END
    echo "NodeName=n[1-$nodes] Name=gpu File=$RUN/dev/gpu[0-1]" >"$RUN/gres.conf"
    echo "CgroupAutomount=no" >"$RUN/cgroup.conf"
    # Nodes have no way to a name server: refusing at once beats a time-out for every name.
    echo "nameserver 127.0.0.1" >"$RUN/resolv.conf"
    echo "$nodes" >"$RUN/nodes"
}

start_munge() {
    mkdir -p "$RUN/munge"
    chmod 700 "$RUN/munge"
    dd if=/dev/urandom of="$RUN/munge/key" bs=128 count=1 status=none
    chmod 600 "$RUN/munge/key"
    /usr/sbin/munged --force --key-file="$RUN/munge/key" --socket="$RUN/munge.socket" --pid-file="$RUN/munge/pid" \
        --log-file="$RUN/munge/log" --seed-file="$RUN/munge/seed" 2>"$RUN/munge/stderr"
}

start_network() {
    local nodes=$1 i
    ip link add dsmbr0 type bridge
    ip addr add "$NETWORK.254/24" dev dsmbr0
    ip link set dsmbr0 up
    for ((i = 1; i <= nodes; i++)); do
        ip netns add "dsm-n$i"
        ip link add "dsmv$i" type veth peer name eth0 netns "dsm-n$i"
        ip link set "dsmv$i" master dsmbr0 up
        ip -n "dsm-n$i" link set lo up
        ip -n "dsm-n$i" addr add "$NETWORK.$i/24" dev eth0
        ip -n "dsm-n$i" link set eth0 up
        echo "$NETWORK.$i n$i # dsmoelora-slurm" >>/etc/hosts
    done
}

start_node() {
    # nsenter and not `ip netns exec`, which mounts a /sys without cgroups that slurmd refuses to start with
    # shellcheck disable=SC2016  # for the inner shell
    nsenter --net="/run/netns/dsm-$1" unshare --uts --mount sh -c '
        hostname "$0"
        mount --bind "$1" /etc/resolv.conf
        exec /usr/sbin/slurmd -N "$0"' "$1" "$RUN/resolv.conf"
}

# Process ids of this cluster's daemons and jobs: all that were started with its SLURM_CONF, but for plain shells.
own_processes() {
    local folder
    for folder in /proc/[0-9]*; do
        grep -qzxF "SLURM_CONF=$SLURM_CONF" "$folder/environ" 2>/dev/null || continue
        if grep -qE '^slurm(ctld|d|stepd|scriptd)$' "$folder/comm" 2>/dev/null ||
            grep -qz "^SLURMD_NODENAME=" "$folder/environ" 2>/dev/null; then
            echo "${folder#/proc/}"
        fi
    done
}

down() {
    [[ -e $RUN/nodes ]] || return 0
    local signal pids i
    for signal in TERM KILL; do
        for ((i = 0; i < 30; i++)); do
            mapfile -t pids < <(own_processes)
            ((${#pids[@]})) || break
            if ((i == 0)); then kill "-$signal" "${pids[@]}" 2>/dev/null || true; fi
            sleep 0.1
        done
    done
    if [[ -s $RUN/munge/pid ]]; then kill "$(cat "$RUN/munge/pid")" 2>/dev/null || true; fi
    for ((i = 1; i <= $(cat "$RUN/nodes"); i++)); do ip netns del "dsm-n$i" 2>/dev/null || true; done
    ip link del dsmbr0 2>/dev/null || true
    # in place: in a container /etc/hosts is often a mount that cannot be replaced
    grep -v '# dsmoelora-slurm$' /etc/hosts >"$RUN/hosts" || true
    cat "$RUN/hosts" >/etc/hosts
    rm -rf "$RUN"
}

case ${1:-} in
up)
    down
    nodes=${2:-3}
    write_configuration "$nodes"
    start_munge
    start_network "$nodes"
    /usr/sbin/slurmctld -i
    for ((i = 1; i <= nodes; i++)); do start_node "n$i"; done
    for ((i = 0; i < 300; i++)); do
        if [[ $(sinfo -h -N -p batch -t idle -o %N 2>/dev/null | wc -l) == "$nodes" ]]; then
            sinfo
            exit 0
        fi
        sleep 0.1
    done
    echo "The nodes did not come up, see $RUN/log." >&2
    exit 1
    ;;
env) echo "export SLURM_CONF=$SLURM_CONF" ;;
kill)
    # All that runs in its network: slurmd, steps and their tasks.
    mapfile -t pids < <(ip netns pids "dsm-$2")
    kill -KILL "${pids[@]}" 2>/dev/null || true
    rm -f "$RUN/pid/$2"
    ;;
start) start_node "$2" ;;
down) down ;;
*)
    sed -n '2,11s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
