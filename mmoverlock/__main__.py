"""Runs a tool of this package: ``python -m mmoverlock TOOL ARGUMENTS``."""

import runpy
import sys
from pathlib import Path

TOOLS = Path(__file__).parent / '.mim' / 'tools'


def main() -> None:
    tools = {path.stem: str(path) for path in sorted(TOOLS.glob('*.py'))}
    name = sys.argv[1] if len(sys.argv) > 1 else '--help'
    if name not in tools:
        asked = name in ('-h', '--help')
        print(
            f'python -m mmoverlock TOOL ARGUMENTS; tools: {", ".join(tools)}',
            file=sys.stdout if asked else sys.stderr,
        )
        sys.exit(0 if asked else 2)
    sys.argv = [tools[name], *sys.argv[2:]]
    runpy.run_path(tools[name], run_name='__main__')


if __name__ == '__main__':
    main()
