"""SkyPilot's own parser on a rendered task; CHERRY_TEST_SKYPILOT names the python of its environment."""

from __future__ import annotations

import os
import sys

import pytest
import yaml

from base.config import validate
from base.errors import ConfigError
from cherry.cluster import ClusterSpec
from cherry.sky.parser import VERSION, check
from cherry.sky.task_file import render
from tests.cherry.sky.test_task_file import SPEC, TWO_HOSTS

PYTHON = os.environ.get("CHERRY_TEST_SKYPILOT")
needs_skypilot = pytest.mark.skipif(PYTHON is None, reason="CHERRY_TEST_SKYPILOT names no environment with SkyPilot")


@pytest.fixture
def task(mini):
    return render(mini(*TWO_HOSTS), validate(SPEC, ClusterSpec, origin="sky.yaml"), origin="sky.yaml")


@needs_skypilot
def test_a_rendered_task_is_one_that_skypilot_takes(task):
    check(task, PYTHON)


@needs_skypilot
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"infra": "awss"}, "'awss' does not match"),
        ({"network_tierr": "best"}, "did you mean 'network_tier'"),
        ({"accelerators": "H100:eight"}, "H100:eight"),
    ],
)
def test_what_skypilot_refuses_is_told_in_its_words(task, changes, told):
    wrong = yaml.safe_load(task)
    wrong["resources"] |= changes
    with pytest.raises(ConfigError, match=rf"SkyPilot \S+ refuses the task: .*{told}"):
        check(yaml.safe_dump(wrong), PYTHON)


@pytest.mark.parametrize(
    ("python", "told"),
    [
        (sys.executable, "has no SkyPilot"),
        ("/nowhere/python", r"does not start \(No such file or directory\)"),
        ("/bin/true", "ended with exit code 0"),
    ],
)
def test_an_environment_without_skypilot_is_told_how_to_get_it(python, told):
    with pytest.raises(ConfigError, match=rf"sky\.client: {python} {told}.*skypilot\[aws,kubernetes\]=={VERSION}"):
        check("name: a\n", python)


def test_an_older_skypilot_is_refused(tmp_path):
    old = tmp_path / "python"
    old.write_text(f'#!/bin/sh\ncd {tmp_path}\nshift\nexec {sys.executable} "$@"\n')  # without -I
    old.chmod(0o755)
    (tmp_path / "sky.py").write_text("__version__ = '0.11.2'\nclass Task:\n    from_yaml = staticmethod(str)\n")
    with pytest.raises(ConfigError, match=r"has SkyPilot 0\.11\.2\. Make an environment for it alone"):
        check("name: a\n", str(old))
