"""One short function per workflow rule: read the inputs, call the library, write the outputs and their record.

A stage gets its settings from a `Spec` alone, its paths from the rule, and how to execute it from `Runtime`.
"""
