//! The server's folders, and the only place where a client's file name becomes a path.

/// The folders of a server.
#[derive(Debug, Default)]
pub struct Folders {}

impl Folders {
    /// Model files of a folder type.
    pub fn list_models(&self, folder: &str) -> Vec<String> {
        let _ = folder;
        Vec::new()
    }

    /// Pictures in the input folder.
    pub fn input_images(&self) -> Vec<String> {
        Vec::new()
    }

    /// `*.latent` files in the input folder.
    pub fn input_latents(&self) -> Vec<String> {
        Vec::new()
    }
}
