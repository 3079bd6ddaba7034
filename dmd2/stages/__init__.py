"""One short function per workflow rule: read the inputs, call the library, write the outputs and their record.

A stage gets all settings from a `Spec`, paths from the rule, and settings of execution from `Runtime`.
"""
