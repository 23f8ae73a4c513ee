"""All that the documentation names is there."""

import ast
import re
from inspect import signature
from pydoc import locate

import pytest
import yaml
from tiny import ROOT, code_of

from mmoverlock.models import OverLoCK

ARGUMENTS = signature(OverLoCK).parameters
PAGES = [
    path.relative_to(ROOT).as_posix()
    for pattern in ('*.md', 'docs/*.md', 'configs/*/README.md')
    for path in sorted(ROOT.glob(pattern))
]
FENCED = re.compile(r'^```.*?^```', re.DOTALL | re.MULTILINE)
LINK = re.compile(r'\[([^\]]*)\]\(([^)\s]+)\)')


@pytest.fixture(params=PAGES)
def page(request):
    return ROOT / request.param


def anchors(page):
    """The ends of links to the headings of a page, as GitHub makes them."""
    headings = re.findall(r'^#+ (.*)', FENCED.sub('', page.read_text()), re.M)
    kept = (re.sub(r'[^\w\- ]', '', text.lower()) for text in headings)
    return {text.replace(' ', '-') for text in kept}


def test_pages():
    links = LINK.findall((ROOT / 'docs/README.md').read_text())
    files = {path.name for path in (ROOT / 'docs').glob('*.md')}
    assert files - {'README.md'} <= {target for _, target in links}


def test_links(page):
    """And the files that are named without one."""
    text = page.read_text()
    for _, link in LINK.findall(FENCED.sub('', text)):
        if '://' in link:
            continue
        name, _, anchor = link.partition('#')
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    folders = 'tools|configs|tests|dev|docs|benchmarks'
    for name in re.findall(rf'(?<![\w/.-])(?:{folders})/[\w./]+', text):
        name = name.rstrip('./')
        assert (page.parent / name).exists() or (ROOT / name).exists(), name


def test_contents(page):
    """A page that lists its headings lists all of the second level."""
    text = FENCED.sub('', page.read_text())
    listed = re.findall(r'^- \[(.*)\]\(#', text, re.M)
    assert listed in ([], re.findall(r'^## (.*)', text, re.M))


def test_commands(page):
    """Options are those of the tools, targets those of the Makefile."""
    makefile = (ROOT / 'Makefile').read_text()
    shared = (ROOT / 'mmoverlock/cli.py').read_text()
    lines = re.findall(r'`([^`\n]+)`', FENCED.sub('', page.read_text()))
    lines += code_of(page, 'shell').replace('\\\n', ' ').splitlines()
    for line in lines:
        for targets in re.findall(r'(?:^| )make ([a-z ]+)', line):
            for target in targets.split():
                assert f'\n{target}:' in makefile, line
        tool = re.search(r'tools/\w+\.py', line)
        if not tool:
            continue
        code = (ROOT / tool[0]).read_text()
        if 'cli.add_arguments' in code:
            code += shared
        if 'cli.add_config_arguments' in code:
            code += "'--cfg-options'"
        for option in re.findall(r'(?<= )--[\w-]+', line[tool.end() :]):
            assert f"'{option}'" in code, line


def test_code(page):
    """Names are there; OverLoCK takes the arguments of calls and configs."""
    names = re.findall(r'\bmmoverlock(?:\.(?!_)\w+)+', page.read_text())
    for node in ast.walk(ast.parse(code_of(page, 'python'))):
        if isinstance(node, ast.ImportFrom):
            names += [f'{node.module}.{item.name}' for item in node.names]
        elif isinstance(node, ast.Call):
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            kind = getattr(given.pop('type', node.func), 'value', None)
            if 'OverLoCK' in (kind, getattr(node.func, 'id', None)):
                assert given.keys() - {'_delete_'} <= ARGUMENTS.keys()
    for name in names:
        if name.startswith('mmoverlock.') and name != 'mmoverlock.timm':
            assert locate(name), name  # that one needs another package


def test_pins():
    """Versions are those that are pinned."""
    page = (ROOT / 'docs/installation.md').read_text()
    files = (ROOT / 'requirements').glob('*.txt')
    pins = {line.split()[0] for path in files for line in open(path)}
    found = re.findall(r'[\w-]+(?:==|<)[\d.]*\d', page)
    found += map('=='.join, re.findall(r'([\w-]+) (\d+\.\d+\.\d+)', page))
    assert len(found) > 15
    for pin in found:
        assert pin in pins, pin


def test_model_zoo():
    """Every config of the paper, and what its metafile says of it."""
    page = ROOT / 'docs/model_zoo.md'
    shown = {link: text for text, link in LINK.findall(page.read_text())}
    for folder in 'imagenet', 'mask_rcnn', 'cascade_mask_rcnn', 'upernet':
        path = ROOT / 'configs' / folder / 'metafile.yml'
        for model in yaml.safe_load(path.read_text())['Models']:
            results = model.get('Results', [])
            metrics = [v for r in results for v in r['Metrics'].values()]
            text = ' / '.join(map(str, metrics)) or '-'
            link = f'../{model["Config"]}'
            assert 'mini' in link or shown[link] == text
