"""`python -m newllm_lib` is the command `newllm`."""

from newllm_lib.cli import main

main(prog_name="newllm")
