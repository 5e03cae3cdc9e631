"""The lessons of the course: their form, and their run from top to bottom with every exercise's stub, wrong answer and solution.

python tests/course/lessons.py [NAME …]     # a table of all lessons, or of those whose names hold a NAME; what is wrong below it
python tests/course/lessons.py --form       # the same without running them
"""

import importlib.util, json, os, re, sys, tempfile, time
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]  # as a script; pytest has done it
LIMIT = 600  # seconds for one lesson on a busy machine; the promise is 60 on a free core
WORDS, LINES, LONGEST = (
    1200,
    120,
    10,
)  # of a lesson; of a lesson and of a cell without the exercises' own cells
FORKS = get_context('forkserver')  # imports once what all lessons import
FORKS.set_forkserver_preload(
    ['IPython', 'matplotlib.pyplot', 'drl_toolkit.recipes.recipes', 'drl_toolkit.evaluation.evaluate']
)


def lessons() -> list:  # of paths, in their order
    "The numbered notebooks of the course."
    return sorted((ROOT / 'nbs/course').glob('[0-9][0-9]_*.ipynb'))


def cells(
    lesson: Path,
) -> list:
    "Its cells; the source of each is one text."
    found = json.loads(lesson.read_text(encoding='utf-8'))['cells']
    return [cell | dict(source=''.join(cell['source'])) for cell in found]


def role(
    cell: dict,
) -> tuple:  # (exercise, role), such as ('2.1', 'stub'); (None, None) of any other cell
    "What a cell is in its exercise."
    course = cell['metadata'].get('course', {})
    return course.get('exercise'), course.get('role')


def wrong_answers(
    lesson: Path,
) -> dict:  # exercise -> `Wrong`
    "The typical mistakes that are tried."
    file = Path(__file__).with_name(f'wrong_{lesson.name[:2]}.py')
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.WRONG


# The form


def words(
    text: str,  # Markdown
) -> int:
    "Words to read: no code, no formulas, no addresses."
    text = re.sub(r'```.*?```|\$\$.*?\$\$|`[^`]*`|\$[^$]*\$|\]\([^)]*\)|<[^>]*>', ' ', text, flags=re.S)
    return len(re.findall(r"[^\W\d_][\w'’-]*", text))


def code_lines(
    source: str,
) -> int:
    "Lines that hold code."
    return sum(bool(line.strip()) and not line.lstrip().startswith('#') for line in source.splitlines())


def form(
    lesson: Path,
) -> dict:
    "What is counted of a lesson."
    found = cells(lesson)
    own = [c for c in found if c['cell_type'] == 'code' and role(c)[1] not in ('stub', 'solution')]
    sizes = [code_lines(c['source']) for c in own]
    outputs = [o for c in found for o in c.get('outputs', [])]
    text = '\n'.join(c['source'] for c in found if c['cell_type'] == 'markdown')
    return dict(
        words=words(text),
        lines=sum(sizes),
        longest=max(sizes, default=0),
        images=sum('image/png' in o.get('data', {}) for o in outputs),
        exercises=len({role(c)[0] for c in found} - {None}),
        checks=sum(role(c)[1] == 'check' for c in found),
        kilobytes=lesson.stat().st_size // 1000,
        predictions=len(re.findall('predict before you run', text, re.I)),
    )


def slug(
    words: str,
) -> str:  # 'likelihood-ratio'
    "How a link names a heading or a term."
    return re.sub(r'\W+', '-', words.lower()).strip('-')


def terms() -> set:  # of slugs
    "What the glossary explains: headings, or bold words at the start of a line; several have commas between them."
    text = '\n'.join(c['source'] for c in cells(ROOT / 'nbs/course/glossary.ipynb'))
    found = re.findall(r'^(?:[-*] )?(?:#+ |\*\*)(.+?)(?:\*\*.*)?$', text, re.M)
    return {slug(part) for term in found for part in (term, *term.split(','))}


def dead_links(
    lesson: Path,
) -> list:  # of sentences
    "Links to pages that are not there, or to terms that the glossary does not explain."
    text = '\n'.join(c['source'] for c in cells(lesson) if c['cell_type'] == 'markdown')
    dead, known = [], terms()
    for target in sorted(set(re.findall(r'\]\(((?!https?:|#|mailto:)[^)\s]+)\)', text))):
        page, _, anchor = target.partition('#')
        if not (lesson.parent / page).is_file():
            dead.append(f'a link leads to {page}, which is not there')
        elif page == 'glossary.ipynb' and anchor and slug(anchor) not in known:
            dead.append(f'the glossary does not explain {anchor}')
    return dead


def misshapen(
    lesson: Path,
) -> list:  # of sentences; empty for a good lesson
    "Where a lesson leaves the form."
    has, found = form(lesson), cells(lesson)
    upper = dict(words=WORDS, lines=LINES, longest=LONGEST, exercises=5, kilobytes=1000)
    lower = dict(images=3, exercises=3, predictions=1)
    said = [f'{name}: {has[name]}, at most {most}' for name, most in upper.items() if has[name] > most]
    said += [f'{name}: {has[name]}, at least {least}' for name, least in lower.items() if has[name] < least]
    errors = [o for c in found for o in c.get('outputs', []) if o['output_type'] == 'error']
    said += [f'a saved output is an error: {o["ename"]}' for o in errors]
    said += [f'no saved outputs in {c["id"]}' for c in found if role(c)[1] == 'check' and not c['outputs']]
    for exercise in sorted({role(c)[0] for c in found} - {None}):
        roles = [role(c)[1] for c in found if role(c)[0] == exercise]
        if roles != ['stub', 'check', 'solution']:
            said.append(f'exercise {exercise} is made of {roles}, not of stub, check and solution')
        if not re.search(
            rf'^### Exercise {re.escape(exercise)}\b', '\n'.join(c['source'] for c in found), re.M
        ):
            said.append(f'exercise {exercise} has no heading "### Exercise {exercise}: …"')
    for c in found:
        folded = c['metadata'].get('jupyter', {}).get('source_hidden') and c['source'].startswith(
            '# Solution'
        )
        if role(c)[1] == 'solution' and not folded:
            said.append(f'the solution of {role(c)[0]} is not folded, or does not begin with "# Solution"')
    return said + dead_links(lesson)


# The run


class Runner:
    "Runs the cells of one lesson, and its wrong answers, in a namespace like a notebook's."

    def __init__(self, lesson: Path):
        from IPython.core.interactiveshell import InteractiveShell

        self.shell = InteractiveShell.instance()
        self.wrong = wrong_answers(lesson)
        self.faults, self.seconds = [], 0.0
        self.answers = {}  # exercise -> the sentences shown to stub, wrong answer and solution

    def cell(self, source: str, name: str):
        "Run a cell; its last value. An exception is a fault."
        import matplotlib.pyplot as plt

        done = self.shell.run_cell(source, store_history=False)
        plt.close('all')
        error = done.error_before_exec or done.error_in_exec
        if error:
            self.faults.append(f'{name} raises {type(error).__name__}: {error}')
        return done.result

    def verdict(self, result, name: str, passed: bool) -> str:
        "The sentence of a check that must have passed, or failed."
        if not hasattr(result, 'says'):
            self.faults.append(f'{name} does not end with a check')
            return ''
        if result.passed is not passed:
            self.faults.append(f'{name} {"fails" if passed else "passes"}: {result.says}')
        if not result.says.strip():
            self.faults.append(f'{name} says nothing')
        return result.says

    def mistake(self, exercise: str, check: str) -> str:
        "Run the wrong answer and its check, between the stub's check and the solution; leave the seeds as they were."
        import random

        import numpy as np, torch

        seeds = random.getstate(), np.random.get_state(), torch.get_rng_state()
        wrong = self.wrong[exercise]
        self.cell(wrong.source, f'the wrong answer to {exercise}')
        says = self.verdict(self.cell(check, f'check {exercise}'), f'the wrong answer to {exercise}', False)
        if wrong.says not in says:
            self.faults.append(f'the wrong answer to {exercise} gets "{says}", without "{wrong.says}"')
        random.setstate(seeds[0])
        np.random.set_state(seeds[1])
        torch.set_rng_state(seeds[2])
        return says

    def run(self, found: list):
        "Every cell from top to bottom."
        for cell in found:
            if cell['cell_type'] != 'code' or re.search(r'^#\| *heavy', cell['source'], re.M):
                continue
            exercise, kind = role(cell)
            began = time.perf_counter()
            result = self.cell(cell['source'], f'{kind} {exercise}' if kind else f'cell {cell["id"]}')
            self.seconds += time.perf_counter() - began
            if kind == 'check':
                says = [self.verdict(result, f'the stub of {exercise}', passed=False)]
                if exercise in self.wrong:
                    says.append(self.mistake(exercise, cell['source']))
                else:
                    self.faults.append(f'no wrong answer to {exercise} in wrong_NN.py')
                self.answers[exercise] = says
            if kind == 'solution':
                self.answers[exercise].append(
                    self.verdict(result, f'the solution of {exercise}', passed=True)
                )


def execute(lesson, findings, printed):
    "In a process of its own: run a lesson; what is found goes to one file, what it prints to another."
    out = os.open(printed, os.O_WRONLY)
    for handle in (1, 2):
        os.dup2(out, handle)
    os.environ |= dict(MPLBACKEND='agg', HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1')
    import torch

    torch.set_num_threads(1)
    began = time.perf_counter()
    os.chdir(lesson.parent)
    runner = Runner(lesson)
    runner.run(cells(lesson))
    found = dict(
        faults=runner.faults,
        answers=runner.answers,
        seconds=runner.seconds,
        whole=time.perf_counter() - began,
    )
    Path(findings).write_text(json.dumps(found), encoding='utf-8')
    sys.stdout.flush()
    os._exit(0)  # threads of a library do not keep it


def run(
    lesson: Path,
) -> dict:  # faults, a list of sentences; answers, {exercise: [to the stub, to the wrong answer, to the solution]}; seconds
    "Run a lesson in a process of its own."
    with tempfile.TemporaryDirectory() as folder:
        findings, printed = Path(folder) / 'findings.json', Path(folder) / 'printed'
        printed.touch()
        process = FORKS.Process(target=execute, args=(lesson, findings, printed))
        process.start()
        process.join(LIMIT)
        if process.is_alive():
            process.kill()
            process.join()
        if findings.is_file():
            return json.loads(findings.read_text(encoding='utf-8'))
        end = printed.read_text(encoding='utf-8', errors='replace')[-3000:]
        fault = f'ended with status {process.exitcode}, or not within {LIMIT} seconds:\n{end}'
        return dict(faults=[fault], answers={}, seconds=float('nan'))


# The table

COLUMNS = ('words', 'lines', 'longest', 'images', 'exercises', 'checks', 'kilobytes')


def main(*names: str) -> int:
    "Print a row for each lesson, and what is wrong."
    running = '--form' not in names
    names = [name for name in names if not name.startswith('-')]
    wrong = []
    print(f'{"lesson":26}', *(f'{name:>9}' for name in (*COLUMNS, *['seconds'] * running)))
    for lesson in lessons():
        if names and not any(name in lesson.name for name in names):
            continue
        has, faults = form(lesson), misshapen(lesson)
        if running:
            done = run(lesson)
            has['seconds'], faults = round(done['seconds'], 1), faults + done['faults']
        wrong += [f'{lesson.stem}: {fault}' for fault in faults]
        print(
            f'{lesson.stem:26}',
            *(f'{has[name]:9}' for name in (*COLUMNS, *['seconds'] * running)),
            flush=True,
        )
    print('', *wrong, sep='\n') if wrong else print('\nevery lesson is within the form')
    return 1 if wrong else 0


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
