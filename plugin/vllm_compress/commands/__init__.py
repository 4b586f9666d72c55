"""The commands of `vllm-compress`, one module each: `add_parser(subparsers)`, `run(args)`."""
