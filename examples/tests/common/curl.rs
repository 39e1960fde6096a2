//! Runs the `curl` lines that an example tells people to type, without needing curl.
//!
//! It knows as much of a shell and of curl as those lines use, and panics at anything else.

use std::collections::HashMap;

use reqwest::Method;

use super::{Answer, Server, send};

/// Runs command lines and remembers variables.
pub(crate) struct Shell<'a> {
    server: &'a Server,
    /// The address in the lines, for which the server's own stands in.
    address: &'a str,
    variables: HashMap<String, String>,
}

impl<'a> Shell<'a> {
    pub(crate) fn new(server: &'a Server, address: &'a str) -> Self {
        Self { server, address, variables: HashMap::new() }
    }

    /// The command lines that call curl in the header of a source file, continuations joined.
    pub(crate) fn lines_in(source: &str) -> Vec<String> {
        let header = source.lines().map_while(|line| line.strip_prefix("//!"));
        let joined = header.map(str::trim).collect::<Vec<_>>().join("\n").replace("\\\n", "");
        joined.lines().filter(|line| line.contains("curl ")).map(str::to_owned).collect()
    }

    /// `curl …`, or `curl … | curl … -H @-`, or `NAME=$(curl … | cut -d'"' -f4)`.
    pub(crate) async fn run(&mut self, line: &str) -> Answer {
        let assigned = line.split_once("=$(").filter(|_| !line.starts_with("curl "));
        let Some((name, command)) = assigned else {
            let piped = line.split_once(" | curl ");
            let Some((first, second)) = piped else { return self.curl(line, "").await };
            let input = self.curl(first, "").await.text();
            return self.curl(&format!("curl {second}"), &input).await;
        };
        let command = command.strip_suffix("| cut -d'\"' -f4)").expect("it takes the first value");
        let answer = self.curl(command.trim(), "").await;
        let value = answer.text().split('"').nth(3).expect("a value").to_owned();
        self.variables.insert(name.to_owned(), value);
        answer
    }

    async fn curl(&self, line: &str, input: &str) -> Answer {
        let mut words = self.words(line).into_iter();
        assert_eq!(words.next().as_deref(), Some("curl"));
        let (mut method, mut url, mut body, mut headers) = (Method::GET, None, None, Vec::new());
        let mut next = |what: &str| words.next().unwrap_or_else(|| panic!("{what} needs a value"));
        loop {
            let word = next("the end");
            match &*word {
                "-i" | "-s" => {}
                "-H" => match next("-H") {
                    word if word == "@-" => headers.extend(input.lines().map(str::to_owned)),
                    header => headers.push(header),
                },
                "-d" => {
                    method = Method::POST;
                    body = Some(next("-d"));
                }
                "<end>" => break,
                _ if word.starts_with('-') => panic!("unknown option {word}"),
                _ => assert!(url.replace(word).is_none(), "two URLs"),
            }
        }
        let url = url.expect("a URL").replace(self.address, &self.server.url);
        assert!(url.starts_with(&self.server.url), "{url} is not an address of this example");
        let mut request = self.server.client.request(method, url);
        for header in headers {
            let (name, value) = header.split_once(": ").expect("a header");
            request = request.header(name, value);
        }
        send(match body {
            Some(body) => request.body(body),
            None => request,
        })
        .await
    }

    /// Words, of which single quotes keep spaces together; variables outside of quotes.
    fn words(&self, line: &str) -> Vec<String> {
        let (mut words, mut word, mut quoted) = (Vec::new(), String::new(), false);
        for c in line.chars().chain([' ']) {
            match c {
                '\'' => quoted = !quoted,
                ' ' if !quoted => {
                    if !word.is_empty() {
                        words.push(std::mem::take(&mut word));
                    }
                }
                '"' | '`' | '\\' if !quoted => panic!("not understood: {line}"),
                _ => word.push(c),
            }
        }
        assert!(!quoted, "an open quote: {line}");
        for word in &mut words {
            for (name, value) in &self.variables {
                *word = word.replace(&format!("${name}"), value);
            }
        }
        words.push("<end>".to_owned());
        words
    }
}
