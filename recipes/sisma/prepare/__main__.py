from recipes.sisma.arguments import run_command
from recipes.sisma.prepare.command import main

run_command(main)
