# SPDX-License-Identifier: BSD-3-Clause
"""The operators as PyTorch sees them, one file for each loss; what a loss means to its caller is
in the public modules above, what it computes is in csrc/.

    library    loads the compiled operators
    memory     where large results lie
    arguments  what public functions ask of their arguments, and errors in their words
    tables     what the operators hand each other, by name
    autograd   what PyTorch is asked about a call
    derivatives  from the formulas of a loss to derivatives of every order and mode
    batching   one call for all elements of a vmap
    factory    from a call and a fake to an operator: every key that PyTorch dispatches on
    cross_entropy, reduce, linear (with linear_chunks)
"""
