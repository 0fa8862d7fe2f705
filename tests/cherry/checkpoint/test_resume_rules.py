"""What may go on in a run directory: the same run by itself, more when it is asked for, never other data or seed."""

import json
import shutil
from argparse import Namespace

import pytest
import torch

from base import storage
from base.config import load
from base.errors import CheckpointError, ConfigError, MissingFileError
from cherry.checkpoint.naming import committed_steps
from cherry.checkpoint.resume_rules import find_checkpoint, rate_change, read_record, settled, starting_point
from cherry.data.prepare import prepare
from cherry.data.sampler import Sampler
from cherry.job_config import DataConfig, JobConfig
from cherry.rank_main import _prepare
from cherry.trainer import Trainer


@pytest.fixture
def start(mini, prepared_data, tmp_path, group):
    """Starts a run in a directory as train.py does, to its end; the trainer."""

    def build(name, *overrides, resume_from=None):
        directory = tmp_path / name
        if not directory.exists():
            directory.mkdir()
            shutil.copytree(prepared_data, directory / "data")
        config = mini("train.steps=4", "train.heldout_sequences=2", *overrides)
        options = Namespace(resume_from=resume_from, config=None, steps=config.train.steps, set=[])
        config, named = _prepare(config, str(directory), options)
        trainer = Trainer(config, str(directory), resume_from=named)
        trainer.run()
        return trainer

    return build


def test_another_run_is_refused_with_the_keys_that_differ_and_the_same_one_goes_on(start, tmp_path, capsys):
    start("first")
    written = load(tmp_path / "first" / "config.yaml", JobConfig)
    other = ("seed=1", "init_from=elsewhere", "train.learning_rate=1e-4")
    with pytest.raises(ConfigError) as caught:
        start("first", *other)
    text = str(caught.value)
    assert f"{tmp_path}/first/train/checkpoints/step_4 is of another run. Give another --run_dir" in text
    for line in ("seed: 0, not 1", "init_from: None, not 'elsewhere'", "train.learning_rate: 0.003, not 0.0001"):
        assert f"\n  {line}" in text
    assert "--resume_from" not in text, "another seed cannot be resumed"
    with pytest.raises(ConfigError, match=r"or --resume_from=.*/step_4 .*\n  train\.batch_size: 8, not 16"):
        start("first", "train.batch_size=16")
    with pytest.raises(CheckpointError, match=r"model\.moe_intermediate_size"):
        start("first", "model.moe_intermediate_size=24")
    assert load(tmp_path / "first" / "config.yaml", JobConfig) == written, "what was refused leaves no trace"
    # Longer, in more parts, launched, saved and reported otherwise: the same run.
    free = ("train.gradient_accumulation_steps=2", "launch.nproc_per_node=4", "checkpoint.every_steps=3")
    assert start("first", "train.steps=6", "train.log_every_steps=2", *free).progress.step == 6
    assert "with another" not in capsys.readouterr().out
    assert load(tmp_path / "first" / "config.yaml", JobConfig).train.steps == 6


def test_what_resume_from_names_goes_on_otherwise_where_the_data_was_left(start, tmp_path, capsys):
    start("run")
    changed = ("train.batch_size=16", "train.learning_rate=1e-5", "train.gradient_accumulation_steps=4")
    resumed = start("run", *changed, "train.steps=6", resume_from="checkpoints/step_4")
    told = capsys.readouterr().out
    assert "step_4 with another train.learning_rate: 0.003 before, 1e-05 now" in told
    assert "step_4 with another train.batch_size: 8 before, 16 now" in told
    assert resumed.progress.position == 4 * 8 + 2 * 16
    assert storage.read_commit(f"{tmp_path}/run/train/checkpoints/step_6")["position"] == 4 * 8 + 2 * 16
    # The batch after the checkpoint is the next sixteen of the same order, whatever it was cut into before.
    sampler = Sampler(len(resumed.dataset), 0, 8)
    halves = [sampler.indices(position) for position in (32, 40)]
    expected = torch.tensor([resumed.dataset.sequence(int(index))[0][0] for half in halves for index in half])
    read = torch.cat([batch.tokens_BT[:, 0] for batch in resumed.batches.read(32).micro_batches])
    assert torch.equal(read, expected)
    start("run", *changed, "train.steps=8")  # from now on these are the run's values


def test_other_data_or_another_seed_is_never_resumed(start, tmp_path, mini):
    start("run")
    uri = str(tmp_path / "run" / "train" / "checkpoints" / "step_4")
    with pytest.raises(ConfigError, match="seed: 0, not 3"):
        start("elsewhere", "seed=3", "train.steps=6", resume_from=uri)
    source = tmp_path / "others"
    source.mkdir()
    for number in range(40):
        (source / f"{number}.txt").write_text(f"the number {number} and some words that follow it " * 20)
    other = tmp_path / "other"
    config = DataConfig(source=str(source), sequence_length=32, heldout_fraction=0.2)
    prepare(config, vocab_size=600, directory=str(other / "data"))
    with pytest.raises(ConfigError, match="prepared data's digest"):
        start("other", f"data.source={source}", "train.steps=6", resume_from=uri)


def test_prepared_data_of_another_source_is_not_taken(start, tmp_path):
    start("run")
    for key, value in (("source", "'elsewhere'"), ("max_documents", "30"), ("tokenizer", "'t.json'")):
        with pytest.raises(ConfigError, match=rf"data\.{key}: .*, not {value}"):
            start("run", f"data.{key}={value}")


def test_a_named_checkpoint_must_leave_something_to_train(start):
    start("run")
    with pytest.raises(ConfigError, match=r"step_4 is at step 4, train\.steps is 4: nothing is left"):
        start("run", resume_from="step_4")
    assert start("run").progress.step == 4, "without one a finished run is found finished"


def test_a_missing_checkpoint_is_told_with_those_that_are_there(tmp_path):
    own, other = tmp_path / "run" / "checkpoints", tmp_path / "other"
    for step in (1000, 50, 200):
        storage.commit(str(own / f"step_{step}"))
    storage.commit(str(other / "step_7"))
    (own / "step_300").mkdir()
    assert find_checkpoint("checkpoints/step_1000", str(own)) == f"{own}/step_1000"
    assert find_checkpoint("step_50", str(own)) == f"{own}/step_50"
    assert find_checkpoint(f"{other}/step_7", str(own)) == f"{other}/step_7"
    for written in ("checkpoints/step_50/", "./checkpoints/step_50", "checkpoints//step_50//", "step_50/", "./step_50"):
        assert find_checkpoint(written, str(own)) == f"{own}/step_50", written
        assert find_checkpoint(f"file://{written}", str(own)) == f"{own}/step_50", written
    for written in (f"{other}/step_7/", f"{other}//step_7", f"file://{other}/step_7/", f"{other}/./step_7"):
        assert settled(find_checkpoint(written, str(own))) == f"{other}/step_7", written
    listed = ", ".join(f"{own}/step_{step}" for step in (50, 200, 1000))
    with pytest.raises(MissingFileError, match=f"step_300 holds no finished checkpoint. There are: {listed}"):
        find_checkpoint("checkpoints/step_300", str(own))
    with pytest.raises(MissingFileError, match=f"There are: {other}/step_7, {listed}"):
        find_checkpoint(f"{other}/step_8", str(own))
    with pytest.raises(MissingFileError, match=f"There are: {listed}"):
        find_checkpoint("elsewhere/step_1000", str(own))


def test_states_of_another_optimizer_are_refused_also_when_named(start, tmp_path):
    start("first")
    rule = r"step_4 has the states of train\.optimizer adamw, not of muon\. Resume with train\.optimizer=adamw"
    for named in (None, "step_4"):
        with pytest.raises(ConfigError, match=rule):
            start("first", "train.optimizer=muon", "train.steps=6", resume_from=named)
    start("second", "train.optimizer=muon")
    with pytest.raises(ConfigError, match=r"train\.optimizer muon, not of adamw"):
        start("second", "train.steps=6")
    assert start("second", "train.optimizer=muon", "train.steps=6").progress.step == 6


def test_a_branch_of_an_older_checkpoint_needs_a_directory_of_its_own(start, tmp_path):
    every = ("checkpoint.every_steps=2", "checkpoint.keep_every_steps=2")
    start("run", *every, "train.steps=8")
    folder = tmp_path / "run" / "train"
    before = storage.stored_files(str(folder / "checkpoints"))
    metrics = (folder / "metrics.jsonl").read_bytes()
    changed = (*every, "train.learning_rate=1e-4", "train.steps=6")
    with pytest.raises(ConfigError) as caught:
        start("run", *changed, resume_from="step_4")
    assert "holds later steps (step_6, step_8), which training from step_4 would write again" in str(caught.value)
    assert f"--run_dir=... --resume_from={folder}/checkpoints/step_4" in str(caught.value)
    named = str(folder / "checkpoints" / "step_4")
    assert start("branch", *changed, resume_from=named).progress.step == 6
    assert storage.read_commit(f"{tmp_path}/branch/train/checkpoints/step_6")["resumed_from"] == named
    assert storage.stored_files(str(folder / "checkpoints")) == before
    assert (folder / "metrics.jsonl").read_bytes() == metrics


def test_a_command_that_named_a_checkpoint_goes_on_from_what_it_saved_since(start, tmp_path):
    start("run")
    changed = ("checkpoint.every_steps=2", "checkpoint.keep_last=1", "train.learning_rate=1e-4")
    start("run", *changed, "train.steps=6", resume_from="checkpoints/step_4")
    checkpoints = str(tmp_path / "run" / "train" / "checkpoints")
    assert committed_steps(checkpoints) == [6], "retention has pruned the one that was named"
    again = start("run", *changed, "train.steps=8", resume_from="checkpoints/step_4")
    assert again.progress.step == 8
    assert again.progress.resumed_from == f"{checkpoints}/step_4"
    # A later part of the same run, started without the flag, is still of that beginning.
    start("run", *changed, "train.steps=9")
    assert starting_point("step_4", checkpoints) == (f"{checkpoints}/step_9", False)


def test_fewer_steps_than_are_done_are_refused_and_nothing_changes(start, tmp_path):
    start("run")
    written = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=r"step_4 is at step 4, train\.steps is 3: nothing is left to train"):
        start("run", "train.steps=3")
    assert (tmp_path / "run" / "config.yaml").read_bytes() == written
    assert committed_steps(f"{tmp_path}/run/train/checkpoints") == [4]


@pytest.mark.parametrize("left", [b"", b"\0" * 512, b'{"step": 4, "fil'])
def test_a_checkpoint_whose_marker_was_cut_is_passed_over_with_a_sentence(start, tmp_path, capsys, left):
    start("run", "checkpoint.every_steps=2")
    whole = start("whole", "checkpoint.every_steps=2")
    newest = tmp_path / "run" / "train" / "checkpoints" / "step_4"
    (newest / "COMMITTED").write_bytes(left)
    capsys.readouterr()
    again = start("run", "checkpoint.every_steps=2")
    told = capsys.readouterr().out
    assert f"{newest} is passed over: its COMMITTED file is empty or cut short" in told
    assert f"resumed from {newest.parent}/step_2" in told
    assert storage.read_commit(str(newest))["step"] == 4
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)
    (newest / "COMMITTED").write_bytes(left)
    with pytest.raises(MissingFileError, match="step_4 holds no finished checkpoint"):
        start("run", "train.steps=6", resume_from="step_4")


def test_a_marker_of_something_else_is_refused(tmp_path):
    storage.commit(str(tmp_path / "step_4"), {"step": None})
    with pytest.raises(CheckpointError, match=r"step_4/COMMITTED: `step` must be a number \(got None\)"):
        read_record(str(tmp_path / "step_4"))


def test_more_steps_move_the_learning_rate_and_this_is_said_and_recorded(start, tmp_path, capsys):
    start("run", "train.learning_rate=1e-3", "train.warmup_steps=0")
    capsys.readouterr()
    trainer = start("run", "train.learning_rate=1e-3", "train.warmup_steps=0", "train.steps=8")
    told = capsys.readouterr().out
    lines = (tmp_path / "run" / "train" / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["learning_rate"] for line in lines]
    line = f"the learning rate is {rates[4]:.3g} at step 5 (it was {rates[3]:.3g} at step 4, and "
    assert f"train.steps: 4 before, 8 now; the cosine schedule covers them all, so {line}" in told
    assert trainer.progress.changes == storage.read_json(f"{tmp_path}/run/train/result.json")["changes"]
    assert line in storage.read_commit(f"{tmp_path}/run/train/checkpoints/step_8")["changes"][0]


def test_a_rate_that_stays_is_not_worth_a_word(mini):
    record = {"step": 4, "steps": 4}
    assert rate_change(mini("train.steps=8", "train.schedule=constant").train, record) is None
    assert rate_change(mini("train.steps=4").train, record) is None
    assert rate_change(mini("train.steps=8").train, {"step": 4}) is None
    assert rate_change(mini("train.steps=8").train, {"step": 4, "steps": 6}) is not None


def test_the_rules_hold_on_an_object_store(start, s3, capsys):
    at = (f"checkpoint.directory={s3}/shared", "checkpoint.every_steps=2")
    start("first", "name=first", *at)
    with pytest.raises(ConfigError, match=r"run 'first' \(.*/first\), and this is run 'second' \(.*/second\)"):
        start("second", "name=second", *at)
    with pytest.raises(ConfigError, match=r"holds later steps \(step_4\)"):
        start("first", "name=first", *at, "train.steps=6", resume_from=f"{s3}/shared/step_2")
    with pytest.raises(ConfigError, match="nothing is left to train"):
        start("first", "name=first", *at, "train.steps=3")
    assert committed_steps(f"{s3}/shared") == [2, 4]
    storage.write_bytes(f"{s3}/shared/step_4/COMMITTED", b"")
    assert start("first", "name=first", *at).progress.step == 4
    assert f"{s3}/shared/step_4 is passed over" in capsys.readouterr().out
    branch = start("branch", "train.steps=6", resume_from=f"{s3}/shared/step_4")
    assert branch.progress.resumed_from == f"{s3}/shared/step_4"


def test_a_store_in_which_attempts_cannot_exclude_each_other_is_refused_at_once(
    mini, unconditional_s3, tmp_path, group
):
    config = mini(f"checkpoint.directory={unconditional_s3}/run")
    options = Namespace(resume_from=None, config=None, steps=4, set=[])
    with pytest.raises(ConfigError, match=r"/run: this store ignores the condition of a put \(If-None-Match: \*\)"):
        _prepare(config, str(tmp_path / "run"), options)
    assert not (tmp_path / "run").exists(), "before any data is prepared"


def test_a_run_whose_checkpoints_are_elsewhere_does_not_begin_anew_over_its_metrics(start, tmp_path):
    start("run")
    metrics, elsewhere = tmp_path / "run" / "train" / "metrics.jsonl", tmp_path / "elsewhere"
    kept, own = metrics.read_bytes(), tmp_path / "run" / "train" / "checkpoints"
    at = f"checkpoint.directory={elsewhere}"
    with pytest.raises(ConfigError, match=rf"has its checkpoints in {own} .up to step_4., .* is {elsewhere} now"):
        start("run", at)
    assert metrics.read_bytes() == kept
    shutil.move(own, elsewhere)
    start("run", at, "train.steps=5")
    with pytest.raises(ConfigError, match=rf"has its checkpoints in {elsewhere} .up to step_5., .* is {own} now"):
        start("run", "train.steps=5")
