//! The helper process of this crate's own tests; `kiln` is its own helper.

fn main() {
    kiln_executor::init_if_asked();
}
