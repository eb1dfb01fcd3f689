"""Studies: claims of the paper as commands, each with its figures as JSON and a page.

A study measures, and returns plain values that JSON can hold. A function beside it turns these
values into a page. ``docs/claims.md`` lists the claims, the commands and what was seen.
"""
