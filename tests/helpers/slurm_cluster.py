"""A Slurm of two nodes on this machine: two "hosts", each with a slurmd."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from patience import wait_until
from two_hosts import Host, two_hosts

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol", "sinfo")


def configuration(folder: Path, hosts: tuple[Host, Host]) -> str:
    nodes = "\n".join(
        f"NodeName={host.name} NodeHostname={host.name} NodeAddr={host.address} CPUs=2"
        for host in hosts
    )
    return f"""\
ClusterName=test
SlurmctldHost={hosts[0].name}({hosts[0].address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
# a requeued job waits until its credential has expired
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=1,bf_interval=1
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=9 PreemptMode=OFF
"""


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Run Slurm until the block ends; yield the environment of commands that reach it.

    Skips the test where Debian's slurm-wlm is not installed, or network namespaces are not allowed.
    """
    if missing := [program for program in _PROGRAMS if not shutil.which(program)]:
        pytest.skip(f"needs Debian's slurm-wlm and munge: no {', '.join(missing)}")
    folder.chmod(0o755)
    for name in ("munge", "state", "spool-first", "spool-second", "bin"):
        (folder / name).mkdir()
    with two_hosts() as hosts:
        (folder / "slurm.conf").write_text(configuration(folder, hosts))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for program in ("sbatch", "squeue", "scancel", "scontrol"):  # the controller is in `first`
            wrapper = folder / "bin" / program
            words = " ".join(f"'{word}'" for word in hosts[0].prefix)
            wrapper.write_text(f'#!/bin/sh\nexec {words} {shutil.which(program)} "$@"\n')
            wrapper.chmod(0o755)
        environment = {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{folder}/bin{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        with _daemons(folder, hosts, os.environ | environment):
            yield environment


@contextmanager
def _daemons(folder: Path, hosts: tuple[Host, Host], environment: dict[str, str]) -> Iterator[None]:
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={folder}/munge/{name}" for option, name in files.items()]
    subprocess.run(["munged", "--force", f"--key-file={key}", *options], check=True)
    started = []
    try:
        for host, command in [
            (hosts[0], ["slurmctld", "-D"]),
            *((host, ["slurmd", "-D", "-N", host.name]) for host in hosts),
        ]:
            output = (folder / f"{command[0]}-{host.name}.out").open("w")
            started.append(
                subprocess.Popen(
                    [*host.prefix, *command], env=environment, stdout=output, stderr=output
                )
            )
        ask = [*hosts[0].prefix, "sinfo", "--noheader", "--states=idle", "--format=%D"]

        def ready() -> bool:
            idle = subprocess.run(ask, env=environment, capture_output=True, text=True).stdout
            return "2" in idle.split()

        wait_until(ready, "two idle nodes")
        yield
    finally:
        for daemon in started:
            for process in [*psutil.Process(daemon.pid).children(recursive=True), daemon]:
                process.kill()
            daemon.wait()
        os.kill(int((folder / "munge/pid").read_text()), signal.SIGTERM)
