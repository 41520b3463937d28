"Hands settings.ini to setuptools; the name and where the version stands are in pyproject.toml."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

settings = ConfigParser(interpolation=None)
settings.optionxform = str                          # names of links keep their capitals
settings.read(Path(__file__).with_name('settings.ini'), encoding='utf-8')
project = settings['project']
lines = lambda text: text.strip().splitlines()

setup(
    description=project['description'],
    long_description=Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=project['author'],
    license_expression=project['license'],
    keywords=project['keywords'].split(', '),
    classifiers=lines(project['classifiers']),
    project_urls=dict(settings['links']),
    python_requires=f">={project['min_python']}",
    packages=find_packages(include=['simclr_nb', 'simclr_nb.*']),
    package_data={'': ['*.html', 'recipes/*.yaml', 'py.typed']},
    install_requires=lines(project['requirements']),
    extras_require={name: lines(text) for name, text in settings['extras'].items()},
    entry_points={'console_scripts': [f'{name} = {target}' for name, target in settings['console_scripts'].items()],
                  'nbdev': ['simclr_nb = simclr_nb._modidx:d']},
)
