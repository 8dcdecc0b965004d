"""The readiness harness: runs the runbook's steps, judges them by what was executed, and keeps the evidence.

It drives the library from outside: nothing here imports nsa or torch (`ci/probes` runs in the interpreter under test).
"""
