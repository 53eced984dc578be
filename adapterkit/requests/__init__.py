"""What each verb is asked for: one frozen dataclass per verb.

A field is an option. Its `Option` says type, help, choices, group and role, and the doors read it from there: the command
line (`adapterkit.cli.options`), the recipe (`adapterkit.recipe.schema`), the Python function (`takes`), the record and
the reference in the docs. A new option is one field here and the code that uses it.
"""
