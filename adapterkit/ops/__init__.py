"""Pure tensor maths: low-rank algebra, combination rules, extraction. No I/O, no names, no models.

Torch is loaded when the first tensor is touched, so that listing the methods and their options stays instant.
"""
