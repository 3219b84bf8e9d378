"""Which processes form one run, according to flags and to the batch queue's variables."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.program import Asked, Program, advice, find_program
from flexmoe_jax.errors import InputError

PID = 4242
STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "2",
    "SLURM_TASK_PID": str(PID),
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-node1-99@1",
}
AUTO, OFF = Asked(distributed="auto"), Asked(distributed="off")
FLAGS = Asked(coordinator="node1:1234", process_id=1, process_count=2)
HERE = "localhost:61517"  # 61440 + 77


@pytest.mark.parametrize(
    "environ",
    [
        {},
        # A shell inside an allocation, and a batch script.
        {"SLURM_NTASKS": "4"},
        {"SLURM_NTASKS": ""},
        {"SLURM_NTASKS": "4x"},
        {"SLURM_NTASKS": "2(x3)"},
        {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        STEP | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},
        # What a task started, as a sweep starts its runs.
        STEP | {"SLURM_TASK_PID": "4241"},
        STEP | {"SLURM_TASK_PID": "junk"},
        STEP | {"SLURM_STEP_NUM_TASKS": "four"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
        MPI,
        # No TPU here, whatever the variable says.
        {"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"},
    ],
)
def test_a_process_is_alone_unless_asked(environ):
    assert find_program(Asked(), environ, PID) is None
    assert find_program(OFF, environ, PID) is None
    # The flags are complete.
    assert find_program(FLAGS, environ, PID) == Program("node1:1234", 2, 1)


@pytest.mark.parametrize(
    ("asked", "environ", "program"),
    [
        (Asked(), STEP, Program(HERE, 4, 2, 2)),
        (Asked(seconds=60), STEP, Program(HERE, 4, 2, 2, 60)),
        (AUTO, STEP | {"SLURM_TASK_PID": "1"}, Program(HERE, 4, 2, 2)),
        (AUTO, STEP | {"SLURM_STEP_ID": "3"}, Program("localhost:62288", 4, 2, 2)),
        (AUTO, STEP | {"JAX_COORDINATOR_PORT": "5"}, Program("localhost:5", 4, 2, 2)),
        (AUTO, STEP | {"SLURM_STEP_NODELIST": "n[07-9,12],m1"}, Program("n07:61517", 4, 2, 2)),
        (AUTO, STEP | {"SLURM_STEP_NODELIST": "r[1-2]n[5,8]-x"}, Program("r1n5-x:61517", 4, 2, 2)),
        (AUTO, STEP | {"SLURM_STEP_NODELIST": "m1,m2"}, Program("m1:61517", 4, 2, 2)),
        (AUTO, MPI, Program("localhost:64253", 2, 1, 1)),
        (
            AUTO,
            {
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_RANK": "0",
                "OMPI_MCA_orte_hnp_uri": "1.0;tcp6://[fe80::1,fe80::2]:9",
                "JAX_COORDINATOR_PORT": "7",
            },
            Program("[fe80::1]:7", 2, 0),
        ),
        (AUTO, {}, Program("", 0, 0)),
        (AUTO, STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        (FLAGS._replace(process_count=1, process_id=0), {}, None),
    ],
)
def test_a_process_that_is_asked_finds_its_program(asked, environ, program):
    assert find_program(asked, environ, PID) == program


@pytest.mark.parametrize(
    ("asked", "environ", "line"),
    [
        (AUTO, {"SLURM_NTASKS": "4"}, "--distributed=auto: no step of Slurm around this"),
        (AUTO, STEP | {"SLURM_PROCID": "4"}, "task 4 of 4 cannot be"),
        (AUTO, STEP | {"SLURM_PROCID": ""}, "SLURM_PROCID='' is no number"),
        (AUTO, STEP | {"JAX_COORDINATOR_PORT": "x"}, "--coordinator=localhost:x: give host:port"),
        (Asked(), STEP | {"SLURM_JOB_ID": "x"}, "SLURM_JOB_ID='x' is no number"),
        (AUTO, MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "mpirun does not say where process 0 is"),
        (FLAGS._replace(distributed="off"), {}, "--distributed=off: leave it out"),
        (FLAGS._replace(process_id=2), {}, "--process_id=2: give 0 to 1"),
        (FLAGS._replace(process_count=0), {}, "--process_count=0: give 1 or more"),
        (FLAGS._replace(coordinator=None), {}, "--coordinator=None: give all of"),
        (FLAGS._replace(coordinator="node1"), {}, "--coordinator=node1: give host:port"),
        (FLAGS._replace(coordinator="node1:x"), {}, "--coordinator=node1:x: give host:port"),
        (FLAGS._replace(coordinator=":1"), {}, "--coordinator=:1: give host:port"),
        (FLAGS._replace(coordinator="a:70000"), {}, "--coordinator=a:70000: give host:port"),
    ],
)
def test_what_cannot_be_joined_is_refused(asked, environ, line):
    with pytest.raises(InputError) as refusal:
        find_program(asked, environ, PID)
    assert line in str(refusal.value)


NAMES = sorted({*STEP, *MPI, "OMPI_MCA_orte_hnp_uri", "TPU_WORKER_HOSTNAMES"})
VALUES = st.sampled_from(
    ("", "0", "1", "2", "4", "-1", "4x", "2(x3)", "9" * 30, "²", "node[", "a,b", "localhost", "x\n")
)


@given(st.dictionaries(st.sampled_from(NAMES), VALUES | st.text(max_size=5)))
def test_any_variables_give_a_program_or_a_line(environ):
    for asked in (Asked(), AUTO):
        # Any other error ends the test; an `InputError` is one line whatever it quotes.
        with contextlib.suppress(InputError):
            program = find_program(asked, environ, PID)
            # Only what was asked for, or is this very task, is joined.
            if program is not None and asked is not AUTO:
                assert environ["SLURM_TASK_PID"] == str(PID)
    assert find_program(OFF, environ, PID) is None


def test_a_task_that_is_alone_is_told_how_to_join():
    assert "among 4 tasks of this Slurm step: --distributed=auto" in advice(Asked(), STEP)
    assert "among 2 tasks of this mpirun: --distributed=auto" in advice(Asked(), MPI)
    for asked, environ in ((OFF, STEP), (Asked(), {"SLURM_NTASKS": "4"}), (Asked(), {})):
        assert advice(asked, environ) == ""
