//! The proof that users can run themselves.
