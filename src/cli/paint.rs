//! Colours on terminals, plain text elsewhere.

use std::io::IsTerminal;

use super::args::Global;

/// Colours that are used, with the weights Celery gives them.
#[derive(Debug, Clone, Copy)]
pub(super) enum Colour {
    /// Names of nodes.
    Cyan,
    /// Good.
    Green,
    /// Bad.
    Red,
    /// Marks of lists.
    White,
    /// Where lines begin.
    BoldWhite,
}

/// Whether standard output is painted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Paint(bool);

impl Paint {
    /// On a terminal, unless the user wants none.
    pub(super) fn stdout(global: &Global) -> Self {
        Self(!global.no_color && std::io::stdout().is_terminal())
    }

    /// No colours.
    #[cfg(test)]
    pub(super) fn none() -> Self {
        Self(false)
    }

    /// The text in a colour.
    pub(super) fn text(self, text: &str, colour: Colour) -> String {
        if !self.0 {
            return text.to_owned();
        }
        let code = match colour {
            Colour::Cyan => "36;1",
            Colour::Green => "32;1",
            Colour::Red => "31;1",
            Colour::White => "37",
            Colour::BoldWhite => "37;1",
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}
