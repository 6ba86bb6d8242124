# SPDX-License-Identifier: BSD-3-Clause
"""The operators as PyTorch sees them, one file for each loss; what a loss means to its caller is
in the public modules above, what it computes is in csrc/.

    cross_entropy, log_probs, divergence, reduce             of logits, or values, that are there
    linear, linear_log_probs, linear_divergence              of hidden states
    linear_chunks   logits chunk by chunk, and products with their gradients
    exchange        what ranks that share the classes of a vocabulary tell each other
    flops           what FlopCounterMode counts for them

    overrides       how subclasses and modes answer for a public function
    jagged          nested tensors as packed ones
    arguments       what public functions ask of their arguments, and errors in their words
    checks          the checks of C++ for tensors that no kernel sees

    factory         from a call and a fake to an operator: every key that PyTorch dispatches on
    derivatives     from the formulas of a loss to derivatives of every order and mode
    batching        one call for all elements of a vmap
    autograd        what PyTorch is asked about a call
    tables          what the operators hand each other, by name
    memory          where large results lie
    library         loads the compiled operators
"""
