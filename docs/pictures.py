"""Make the README's pictures anew: `python docs/pictures.py`, with the extra `pictures` and Chromium installed.

Two runs of the tiny model with different learning rates on a Prefect server, with their MLflow page, and the better one
served: screenshots of what a person then has on the screen.
"""

from __future__ import annotations

import argparse
import html
import os
import pty
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from fcntl import ioctl
from pathlib import Path

import httpx
import pyte
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
SCRIPTS = Path(sys.prefix) / "bin"
COLUMNS, LINES = 112, 44
_COLORS = {"red": "#e06c75", "green": "#98c379", "brown": "#e5c07b", "yellow": "#e5c07b", "blue": "#61afef"}
_COLORS |= {"magenta": "#c678dd", "cyan": "#56b6c2", "white": "#dcdfe4", "black": "#5c6370", "brightblack": "#7f848e"}
_TERMINAL = """<body style="margin:0;background:#1e2127;display:inline-block">
<pre style="margin:0;padding:18px;color:#dcdfe4;font:15px/1.35 'DejaVu Sans Mono',monospace">{lines}</pre></body>"""


def free_port() -> int:
    """Number of a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(command: list[str], address: str, environment: dict[str, str], log: Path) -> Iterator[None]:
    """A server that answers at `address`; ended with all that it started."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"{command[0]} ended with {process.returncode}:\n{log.read_text()}")
            with suppress(httpx.HTTPError):
                if httpx.get(address, timeout=2, trust_env=False).is_success:
                    break
            time.sleep(0.2)
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def in_terminal(command: list[str], environment: dict[str, str]) -> str:
    """The last screen of a program in a terminal, as HTML.

    Raises:
        RuntimeError: the program failed.
    """
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    primary, secondary = pty.openpty()
    ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    terminal = environment | {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(LINES)}
    process = subprocess.Popen(command, env=terminal, stdin=secondary, stdout=secondary, stderr=secondary)
    os.close(secondary)
    with suppress(OSError):  # how a terminal says that its last program has ended
        while data := os.read(primary, 65536):
            stream.feed(data)
    os.close(primary)
    if process.wait():
        raise RuntimeError("\n".join(screen.display))
    shown = f"$ {' '.join(['cherry', *command[1:]])}"
    lines = [html.escape(shown), *("".join(_cells(screen.buffer[row])) for row in range(LINES))]
    return _TERMINAL.format(lines="\n".join(lines).rstrip())


def _cells(row: dict[int, pyte.screens.Char]) -> Iterator[str]:
    """HTML of one line of the screen."""
    for column in range(COLUMNS):
        cell = row[column]
        color = _COLORS.get(cell.fg, f"#{cell.fg}" if len(cell.fg) == 6 and cell.fg.isalnum() else "inherit")
        weight = "bold" if cell.bold else "normal"
        text = html.escape(cell.data)
        plain = text == " " or (color == "inherit" and weight == "normal")
        yield text if plain else f'<span style="color:{color};font-weight:{weight}">{text}</span>'


def shoot(page: Page, address: str, name: str, *, wait_for: str, close: str | None = None) -> None:
    """Write the picture of a page, once it shows the text `wait_for` and the panel with the button `close` is shut."""
    page.set_viewport_size({"width": 1500, "height": 960})
    page.goto(address, wait_until="load")
    page.get_by_text(wait_for).first.wait_for(timeout=120_000)
    if close is not None:
        page.get_by_role("button", name=close, exact=True).last.click()
    page.wait_for_timeout(4_000)  # charts draw themselves with an animation
    save(page, name)


def save(page: Page, name: str, selector: str | None = None) -> None:
    """Write the picture of what a page shows, or of one element of it."""
    PICTURES.mkdir(exist_ok=True)
    target = PICTURES / f"{name}.png"
    if selector is None:
        page.screenshot(path=target)
    else:
        page.locator(selector).screenshot(path=target)
    print(f"wrote {target.relative_to(ROOT)}, {target.stat().st_size / 1000:.0f} kB", flush=True)


def post(address: str, body: object) -> list[dict[str, object]]:
    """Answer of a JSON API."""
    return list(httpx.post(address, json=body, timeout=60, trust_env=False).raise_for_status().json())


def main() -> None:
    """Make all five pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400, help="training steps of each run")
    steps = parser.parse_args().steps
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        parser.error("no Chromium on PATH: install it (Debian: apt-get install chromium)")
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        browser = stack.enter_context(sync_playwright()).chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        page = browser.new_page(device_scale_factor=1)
        prefect, mlflow = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
        environment = os.environ | {
            "HOME": str(home),
            "PREFECT_HOME": str(home / "prefect"),
            "PREFECT_API_URL": f"{prefect}/api",
            "PREFECT_UI_API_URL": f"{prefect}/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        shutil.copytree(ROOT / "configs", home / "configs")
        os.chdir(home)
        start = [str(SCRIPTS / "prefect"), "--no-prompt", "server", "start", "--port", prefect.rpartition(":")[2]]
        stack.enter_context(server(start, f"{prefect}/api/health", environment, home / "prefect.log"))
        make(page, home, environment, steps)
        start = [str(SCRIPTS / "mlflow"), "server", "--backend-store-uri", "sqlite:///runs/mlflow.db", "--workers", "1"]
        start += ["--port", mlflow.rpartition(":")[2]]
        stack.enter_context(server(start, f"{mlflow}/health", environment, home / "mlflow.log"))
        shoot_pages(page, prefect, mlflow)


def make(page: Page, home: Path, environment: dict[str, str], steps: int) -> None:
    """Train and deploy, with pictures of the terminal, the plan and the gateway's page on the way."""
    cherry = str(SCRIPTS / "cherry")
    run = [cherry, "run", "configs/tiny.yaml", f"train.steps={steps}"]
    subprocess.run([*run, "name=slow-rate", "train.learning_rate=5e-4"], env=environment, check=True)
    page.set_content(in_terminal([*run, "name=fast-rate"], environment))
    save(page, "terminal", "pre")
    plan = [cherry, "plan", "configs/671b.yaml", "--cluster", "configs/clusters/h100-256.yaml", "--plot"]
    subprocess.run([*plan, str(PICTURES / "plan.png")], env=environment, check=True)
    deploy = [cherry, "deploy", "configs/tiny.yaml", "name=fast-rate", f"serve.port={(port := free_port())}"]
    subprocess.run(deploy, env=environment, check=True)
    try:
        page.set_viewport_size({"width": 1100, "height": 760})
        page.goto(f"http://127.0.0.1:{port}/")
        page.fill("#key", Path("runs/serving/key").read_text().strip())
        page.fill("#prompt", "def read_file(")
        page.get_by_role("button", name="Ask").click()
        page.get_by_text("tokens in").wait_for()
        page.get_by_text("Versions behind this gateway").wait_for()
        page.wait_for_timeout(1_000)
        save(page, "gateway")
    finally:
        subprocess.run([cherry, "stop"], env=environment, check=True)


def shoot_pages(page: Page, prefect: str, mlflow: str) -> None:
    """Pictures of Prefect's page of a run and of MLflow's comparison of two."""
    runs = post(f"{prefect}/api/flow_runs/filter", {"sort": "START_TIME_ASC"})  # training before its release
    chosen = next(run for run in runs if run["name"] == "fast-rate")
    shoot(page, f"{prefect}/runs/flow-run/{chosen['id']}", "prefect", wait_for="fast-rate")
    shoot(
        page,
        f"{mlflow}/#/experiments/1/runs?viewStateShareKey=cherry&compareRunsMode=CHART",
        "mlflow",
        wait_for="fast-rate",
        close="Close",  # MLflow's assistant
    )


if __name__ == "__main__":
    main()
