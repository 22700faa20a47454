//! The only place that prints. A closed pipe ends output quietly, as Unix tools do.

use std::io::Write;

/// Prints to standard output.
pub fn print(text: &str) {
    write(&mut std::io::stdout().lock(), text);
}

/// Prints to standard error.
pub fn print_error(text: &str) {
    write(&mut std::io::stderr().lock(), text);
}

/// Prints to standard output; says whether somebody is still reading.
pub fn try_print(text: &str) -> bool {
    let mut stream = std::io::stdout().lock();
    stream
        .write_all(text.as_bytes())
        .and_then(|()| stream.flush())
        .is_ok()
}

fn write(stream: &mut dyn Write, text: &str) {
    // Whoever closed the other end does not want the rest.
    drop(
        stream
            .write_all(text.as_bytes())
            .and_then(|()| stream.flush()),
    );
}
