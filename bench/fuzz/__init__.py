"""A seeded and bounded fuzzer of bundles, inputs and data files: `python -m bench.fuzz -h`. Linux only.

Each case is drawn from its seed and number alone, and runs in a process whose memory is limited. What the library does
with it is held against what the documentation promises: it answers rightly or raises `QAOnnxError`. A finding is

- a crash of the process, or a hang: no result within `TIME_LIMIT_SECONDS`
- an exception that is no `QAOnnxError`, also in a thread or a destructor; a status of the command line but 0, 2, 130
- a peak of memory above `MEMORY_LIMIT_BYTES`
- a wrong result: a span that is not the answer's text, a score that is no probability, an answer that differs in a
  batch, a bundle that was loaded with a wrong checksum or with data from elsewhere
"""
