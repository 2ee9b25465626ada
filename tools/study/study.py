"""A small reproduction of the paper on real photographs: several arms and seeds, with a table and a figure.

python tools/study/study.py run --data data/cifar10 --work-dir work_dirs/study    # run it again to resume
python tools/study/study.py report --results work_dirs/study/results.jsonl --out work_dirs/study
python tools/study/study.py time --json work_dirs/study/time.json                 # time training steps of all arms

--data is a folder of images, train/CLASS/* and test/CLASS/*. arms.py defines the arms and the budgets. LightlyTrain's
arm is skipped unless --lightly-python is a Python that has lightly-train beside mmmilan.
"""

from __future__ import annotations

import mmmilan  # noqa: F401  (first: it handles Ctrl-C while the others are imported)

# isort: split
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from arms import ARMS, BUDGETS, LIGHTLY, PAPER, SEEDS, read_arm, study_id
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmmilan.errors import InputError, exit_on_input_error
from mmmilan.files import check_output, check_output_folder, make_folder, write_text

console = Console()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('command', choices=('run', 'one', 'report', 'time'))
    parser.add_argument(
        '--data', type=Path, default=Path('data/cifar10'), help='folder with train/CLASS and test/CLASS'
    )
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/study'), help='folder of the runs')
    parser.add_argument('--results', type=Path, help='JSON lines, one per run; default: results.jsonl in the work dir')
    parser.add_argument('--budget', choices=BUDGETS, default='long', help='how much an arm is trained')
    parser.add_argument('--arms', nargs='+', metavar='ARM', help="these, in this order (default: the paper's)")
    parser.add_argument('--seeds', nargs='+', type=int, default=list(SEEDS))
    parser.add_argument('--lightly-python', default=sys.executable, help='a Python that has lightly-train')
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time, one thread each')
    parser.add_argument('--out', type=Path, help='report: folder of the table and the figure')
    parser.add_argument('--json', type=Path, help='time: write the figures to this file')
    parser.add_argument('--rounds', type=int, default=9, help='time: rounds')
    parser.add_argument('--overwrite', action='store_true', help='report, time: replace the files that exist')
    args = parser.parse_args()
    args.results = args.results or args.work_dir / 'results.jsonl'
    args.arms = args.arms or list(PAPER)
    if args.json:
        check_output(args.json, endings=('.json',), overwrite=args.overwrite)
    return args


def read_results(path: Path) -> list[dict]:
    """The lines of a results file; [] if there is no file.

    Raises:
        InputError: a line is not complete JSON, or belongs to another study.
    """
    lines = []
    for number, text in enumerate(path.read_text(encoding='utf-8').splitlines() if path.exists() else [], start=1):
        try:
            lines.append(dict(json.loads(text)))
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f'{path}, line {number}, is not complete JSON; remove the line.') from error
        line = lines[-1]
        known = line.get('arm') in (*ARMS, 'teacher') and line.get('budget') in BUDGETS
        if not known or line.get('study') != study_id(line['arm'], line['budget']):
            raise InputError(
                f'{path}, line {number}, {line.get("arm")}, is of another study (other arms or other configs); '
                'name another file.'
            )
    return lines


def start(arm: str, seed: int, args: argparse.Namespace) -> subprocess.Popen:
    """Start a run in its own process with one thread; it writes its line to its own file."""
    command = [sys.executable, __file__, 'one', '--data', args.data, '--work-dir', args.work_dir]
    command += ['--arms', arm, '--seeds', seed, '--results', line_path(arm, seed, args)]
    command += ['--budget', args.budget, '--lightly-python', args.lightly_python]
    log = open(args.work_dir / 'log.txt', 'a', encoding='utf-8')  # noqa: SIM115 (the process keeps it open)
    environment = os.environ | dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')
    return subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=log)


def line_path(arm: str, seed: int, args: argparse.Namespace) -> Path:
    """The file to which a run writes its line."""
    return args.work_dir / 'lines' / f'{arm}-{seed}-{args.budget}.json'


def run_all(args: argparse.Namespace) -> None:
    """Run everything that has no line in the results file: first the teacher, then the arms seed by seed.

    Raises:
        InputError: the data set is missing, an arm is unknown, or a run failed.
    """
    for name in ('train', 'test'):
        if not (args.data / name).is_dir():
            raise InputError(f'The folder {args.data / name} does not exist; --data needs train/CLASS and test/CLASS.')
    for arm in args.arms:
        read_arm(arm)
    lines = read_results(args.results)
    done = {(line['arm'], line['seed']) for line in lines if line['budget'] == args.budget}
    check_output(args.results, overwrite=True)  # all its lines are of this study
    make_folder(args.work_dir)
    waiting = [run for run in [('teacher', 0), *((a, s) for s in args.seeds for a in args.arms)] if run not in done]
    if any(arm == LIGHTLY for arm, _ in waiting) and not has_lightly(args.lightly_python):
        waiting = [run for run in waiting if run[0] != LIGHTLY]
        console.print(f'{LIGHTLY} is skipped: {args.lightly_python} has no lightly-train; see --lightly-python.')
    columns = [TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console) as progress:
        task = progress.add_task('runs', total=len(waiting))
        running: dict[tuple[str, int], subprocess.Popen] = {}
        while waiting or running:
            jobs = 1 if ('teacher', 0) in running else args.jobs
            while waiting and len(running) < jobs:
                running[waiting[0]] = start(*waiting[0], args)
                jobs = 1 if waiting.pop(0)[0] == 'teacher' else args.jobs
            progress.update(task, description=', '.join(f'{arm} ({seed})' for arm, seed in running))
            time.sleep(0.5)
            for key in [key for key, process in running.items() if process.poll() is not None]:
                lines.append(finish(key, running.pop(key), args))
                write_text(args.results, ''.join(json.dumps(line) + '\n' for line in lines))
                progress.advance(task)
                console.print(f'{key[0]} ({key[1]}): {lines[-1]["measures"]}')


def has_lightly(python: str) -> bool:
    """Whether this Python has LightlyTrain."""
    return subprocess.run([python, '-c', 'import lightly_train'], capture_output=True, check=False).returncode == 0


def finish(run: tuple[str, int], process: subprocess.Popen, args: argparse.Namespace) -> dict:
    """The line of a run that has ended.

    Raises:
        InputError: the run failed.
    """
    if process.returncode:
        raise InputError(
            f'The run {run[0]}, seed {run[1]}, failed (status {process.returncode}); read {args.work_dir / "log.txt"}, '
            'then run the same command to resume.'
        )
    return json.loads(line_path(*run, args).read_text(encoding='utf-8'))


def main() -> None:
    args = parse_args()
    if args.command == 'run':
        run_all(args)
    elif args.command == 'one':
        from run import run

        [arm], [seed] = args.arms, args.seeds
        line = run(arm, seed, args.budget, args.data, args.work_dir, args.lightly_python)
        write_text(args.results, json.dumps(dict(study=study_id(arm, args.budget)) | line) + '\n')
    elif args.command == 'time':
        from steps import time_steps

        time_steps(args)
    else:
        from report import FILES, write_report

        folder = args.out or args.work_dir
        check_output_folder(folder, FILES, [args.results], overwrite=args.overwrite)
        lines = [line for line in read_results(args.results) if line['budget'] == args.budget]
        write_report(lines, folder)


if __name__ == '__main__':
    with exit_on_input_error():
        main()
