//! Recorded answers as responses, for endpoints that say what became of a request.

use axum::response::{IntoResponse, Response};
use http::{StatusCode, header};

use super::serve::replayed;
use crate::record::Answer;

/// One that no handler can have given, since a header of it is none, is a 500 without a body.
impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        match self {
            Self::Value(value) => {
                ([(header::CONTENT_TYPE, "application/json")], value.json).into_response()
            }
            response @ Self::Response(_) => replayed(response, None)
                .unwrap_or_else(|| StatusCode::INTERNAL_SERVER_ERROR.into_response()),
        }
    }
}
