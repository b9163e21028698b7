"""`python -m tidegate_tools`: the same as the `tidegate` script."""

from tidegate_tools.main import main

main(prog_name="tidegate")
