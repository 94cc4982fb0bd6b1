"""Array maths without state: columns, pooling and its adjoint, reusable buffers."""
