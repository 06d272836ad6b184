"""A coverage-guided fuzzer for the data plane's C, and a blind one for what is read in Python.

    python -m tests.fuzz.run                # 1,000,000 inputs and more, some minutes; prints a JSON report

`build` compiles the extension once more, with edge coverage and gcc's address and undefined-behaviour sanitizers;
`targets` say what is fed and what is right; `campaign` mutates inputs and keeps those that reach something new;
`worker` is the process that may crash, and `run` the one that sees it.
"""
