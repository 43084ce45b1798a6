"""GPU launches of one decoded token, and the bytes that they move, counted on any machine.

From the root of the repository: python -m tests.dispatches.count --geometry 4b. worker.py records the graph of a
program with markers.py. dispatch_rule.py says how many launches it takes, byte_rule.py how many bytes these move; both
follow how arrays lie in memory (layout.py). dispatches.py adds them up. draft_step.py and draft_dispatches.py do so for
a step with drafts.
"""
