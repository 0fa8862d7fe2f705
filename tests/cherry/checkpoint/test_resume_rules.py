"""What may go on in a run directory: the same run by itself, more when it is asked for, never other data or seed."""

import shutil
from argparse import Namespace

import pytest
import torch

from base import storage
from base.config import load
from base.errors import CheckpointError, ConfigError, MissingFileError
from cherry.checkpoint.resume_rules import find_checkpoint
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
    with pytest.raises(ConfigError, match=r"step_4 is at step 4, train\.steps is 4: raise --steps"):
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
